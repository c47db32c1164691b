"""What the commands of the package share: their exit statuses, and how wide a table may be."""

from __future__ import annotations

# Exit statuses: after a failure; after input that cannot be used, as shells and argparse have it; where a run is to go
# on later (EX_TEMPFAIL of sysexits.h); and after Ctrl-C, as shells have it.
FAILED, USAGE, REQUEUE, INTERRUPTED = 1, 2, 75, 130

# Columns of a table that goes to a file: enough for its cells to stay on one line.
FILE_WIDTH = 160
