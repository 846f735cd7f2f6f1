#!/bin/sh
# Runs nvcc and fails where ptxas says, in a mere note, that it serialized wgmma, made it wait, or ignored setmaxnreg:
# C7504..C7518. (C7519, a warpgroup.arrive injected, costs nothing.) What ptxas says of each kernel's registers and
# memory goes into a file beside the object, for scripts/precompile.py.
object=
previous=
for word in "$@"; do
  [ "$previous" != -o ] || object=$word
  previous=$word
done
log=$("$@" 2>&1)
status=$?
[ -z "$object" ] || printf '%s\n' "$log" >"$object.ptxas"
usage='^ptxas info  *: \(Compiling entry\|Function properties\|Used \|[0-9]* bytes\|Compile time\)\|^ *[0-9]* bytes stack frame'
printf '%s\n' "$log" | grep -v -e "$usage" -e '^$' >&2
# A build for tests alone may have all that.
case " $* " in *' -DKESTREL_DELAYS '*) exit $status ;; esac
case $log in *'(C750'[4-9]')'* | *'(C751'[0-8]')'*) exit 1 ;; esac
exit $status
