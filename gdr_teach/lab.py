"""JupyterLab's files, as `make lab` serves them: a tracked notebook can be run and changed, but not saved over.

Lab rewrites a notebook's metadata when it is opened and saves by itself, so that a learner who only reads would alter
tracked files, and the next `git pull` would refuse. Exercises are worked on in my/, and a chapter that someone changed
is kept with "Save Notebook As...".
"""

from typing import Any

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from tornado.web import HTTPError

TRACKED = ("notebooks", "exercises", "solutions")


class CourseFiles(AsyncLargeFileManager):
    """Jupyter's own manager of files, but notebooks of tracked folders are read-only."""

    async def get(self, path: str, *args: Any, **named: Any) -> dict[str, Any]:
        """The model of a file or folder, as Jupyter's manager gives it."""
        model = await super().get(path, *args, **named)
        for one in (model, *(model["content"] or () if model["type"] == "directory" else ())):
            if is_tracked(one["path"]):
                one["writable"] = False
        return model

    async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        """Save a file. Raises: HTTPError 403 for a tracked notebook."""
        if is_tracked(path):
            said = f"{path} belongs to the course and stays as it is: keep a copy with Save Notebook As, in my/"
            raise HTTPError(403, said, reason=said)
        return await super().save(model, path)


def is_tracked(path: str) -> bool:
    """Whether a path, from the course's folder on, is that of a tracked notebook."""
    folder, _, rest = path.strip("/").partition("/")
    return folder in TRACKED and rest.endswith(".ipynb")
