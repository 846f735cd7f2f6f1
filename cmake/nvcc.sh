#!/bin/sh
# Runs nvcc and fails where ptxas says, in a mere note (C75xx), that it serialized wgmma or ignored setmaxnreg.
log=$("$@" 2>&1)
status=$?
[ -z "$log" ] || printf '%s\n' "$log" >&2
case $log in *'(C75'*) exit 1 ;; esac
exit $status
