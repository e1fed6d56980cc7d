#!/bin/sh
# Copies the exercises that are missing into my/ and opens the course. Called by `make lab`.
set -eu

.venv/bin/gdr-teach my

# Lab's terminals find gdr-teach and the environment's python. They must not be login shells, which is Lab's
# default without a screen: /etc/profile resets PATH on some systems. A ~/.bashrc may put another python in
# front, so bash starts from a file of ours that has the last word.
COURSE_BIN="$PWD/.venv/bin"
PATH="$COURSE_BIN:$PATH"
export COURSE_BIN PATH
shell=${SHELL:-/bin/sh}
command="[\"$shell\"]"
[ "${shell##*/}" != bash ] || command="[\"$shell\", \"--rcfile\", \"$PWD/tools/terminal.sh\"]"

[ "$(id -u)" -ne 0 ] || set -- --allow-root "$@"

exec .venv/bin/jupyter lab \
    --ServerApp.root_dir="$PWD" \
    --ServerApp.contents_manager_class=gdr_teach.lab.CourseFiles \
    --ServerApp.terminado_settings="{'shell_command': $command}" \
    --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb \
    "$@"
