# Start file of bash in Lab's terminals: the user's own, then .venv/bin in front of what that put on PATH.
[ ! -r ~/.bashrc ] || . ~/.bashrc
PATH="$COURSE_BIN:$PATH"
