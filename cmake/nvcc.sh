#!/bin/sh
# Runs nvcc and fails where ptxas says, in a mere note, that it serialized wgmma, made it wait, or ignored setmaxnreg:
# C7504..C7518. (C7519, a warpgroup.arrive injected, costs nothing.)
log=$("$@" 2>&1)
status=$?
[ -z "$log" ] || printf '%s\n' "$log" >&2
case $log in *'(C750'[4-9]')'* | *'(C751'[0-8]')'*) exit 1 ;; esac
exit $status
