"""The generalized delta rule, from "what is S_t?" to its kernels.

    S_t = exp(log_decay_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          o_t = scale * S_t^T q_t

Reading order:

1. `notation`     the letters, the shapes, what an operator returns
2. `memory`       chapter 1: the state as an associative memory, written without erasing
3. `delta`        chapter 2: `reference` (plain PyTorch), `recurrent` (Triton), `op` and `step` (what you call)
4. `iplr`         chapter 3: reading and writing along directions of their own, the same files
5. `lifts`        chapter 3: how a rule of one family is written in another
6. `stability`    chapter 4: which of these states grow, and parametrisations whose states do not
7. `gated`        chapter 5: the delta rule with decay, the same files
8. `dplr`         chapter 5: free directions and decay, the whole formula above, the same files
9. `chunkwise`    chapters 6 to 9: `wy`, `affine` and `levels` (plain PyTorch, one step a function), then the same as
                  kernels: `triangular`, `decay`, `prepare`, `scan`, `grads`, and `tied` and `untied`, which launch them
10. `runtime`     one kernel source: interpreted for CPU tensors, compiled for GPU tensors
11. `sanitizer`   what a kernel may read and write, checked address by address
12. `testing`     the float64 oracle, the hard inputs, the one comparison

Nothing is imported before it is used: `import gdr_teach` needs neither torch nor triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arguments import value_checks as value_checks
    from .delta.op import delta_rule as delta_rule
    from .delta.step import delta_rule_step as delta_rule_step
    from .dplr.op import dplr_delta_rule as dplr_delta_rule
    from .dplr.step import dplr_delta_rule_step as dplr_delta_rule_step
    from .gated.op import gated_delta_rule as gated_delta_rule
    from .gated.step import gated_delta_rule_step as gated_delta_rule_step
    from .iplr.op import iplr_delta_rule as iplr_delta_rule
    from .iplr.step import iplr_delta_rule_step as iplr_delta_rule_step
    from .notation import Output as Output
    from .notation import Path as Path
    from .paths import explain as explain

__version__ = "0.1.0"

_HOME = {  # public name -> the module that holds it
    "delta_rule": "delta.op",
    "delta_rule_step": "delta.step",
    "gated_delta_rule": "gated.op",
    "gated_delta_rule_step": "gated.step",
    "iplr_delta_rule": "iplr.op",
    "iplr_delta_rule_step": "iplr.step",
    "dplr_delta_rule": "dplr.op",
    "dplr_delta_rule_step": "dplr.step",
    "explain": "paths",
    "value_checks": "arguments",
    "Output": "notation",
    "Path": "notation",
}
__all__ = [
    "Output",
    "Path",
    "delta_rule",
    "delta_rule_step",
    "dplr_delta_rule",
    "dplr_delta_rule_step",
    "explain",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "iplr_delta_rule",
    "iplr_delta_rule_step",
    "value_checks",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'gdr_teach' has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next look-up does not come here again
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
