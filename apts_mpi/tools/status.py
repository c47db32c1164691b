"""Exit statuses of the commands."""

# After a failure; after input that cannot be used, as shells and argparse have it; where a run is to go on later
# (EX_TEMPFAIL of sysexits.h); and after Ctrl-C, as shells have it.
FAILED, USAGE, REQUEUE, INTERRUPTED = 1, 2, 75, 130
