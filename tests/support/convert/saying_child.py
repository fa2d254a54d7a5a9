"""A child process for tests: prints the lines that its jobs name, and exits or aborts as they say."""

import os
import sys

from convert.child import read_job, tell


def main() -> int:
    while True:
        job = read_job()
        for line in job["say"]:
            tell(line)
        if job.get("abort"):
            os.abort()
        if not job.get("more"):
            return int(job["exit"])


if __name__ == "__main__":
    sys.exit(main())
