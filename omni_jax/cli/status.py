"""Exit statuses of the command line."""

DONE = 0
DONE_WITH_SKIPPED = 1  # some records could not be used; they are listed in a file
BAD_INPUT = 2
STOPPED_AND_SAVED = 75  # EX_TEMPFAIL: stopped by SIGTERM after saving, run again to resume
INTERRUPTED = 130  # 128 + SIGINT
TERMINATED = 143  # 128 + SIGTERM, with nothing to save
