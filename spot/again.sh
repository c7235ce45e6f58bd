#!/bin/sh
# How a start of the job ended, and what follows. systemd runs this after each (ExecStopPost of finetune.service),
# and starts the job again by itself unless this script or the unit forbids it. Whatever cannot be read or written
# here counts as "no more": a machine that nobody understands must not cost money for ever.
RETRIES=3                                                # so many failures are forgiven; 75 is none
FAILURES=${STATE_DIRECTORY:-/var/lib/finetune}/failures  # a line for each; only success forgets them, no reboot

# A person stops or restarts the job, or the machine is going down: nothing to decide.
systemctl list-jobs --no-legend finetune.service | grep -Eq ' (stop|restart) ' && exit 0

how="${EXIT_CODE:-not started} ${EXIT_STATUS:-}"
case $how in
"exited 75") echo "asked to stop: it is started again"; exit 0 ;;
"exited 0") end="done"; rm -f "$FAILURES" ;;
"exited 64") end="failed for good: the job said above what has to be changed" ;;
*)
    if echo "$(date -Is) $how" >>"$FAILURES" && [ "$(wc -l <"$FAILURES")" -le "$RETRIES" ]; then
        echo "failed ($how), number $(wc -l <"$FAILURES") of $RETRIES that are forgiven: it is started again"
        exit 0
    fi
    end="failed ($how), and no more failures are forgiven: see $FAILURES"
    systemctl --no-block stop finetune.service           # or systemd would start it again
    ;;
esac
echo "$end"
# Not for ever: systemd ends this script after TimeoutStopSec, and the machine would stay on.
[ -z "${AT_END:-}" ] || timeout --kill-after=5 60 sh -c "$AT_END" || echo "AT_END failed: $AT_END"
[ "${SHUTDOWN:-yes}" = no ] || systemctl --no-block poweroff
