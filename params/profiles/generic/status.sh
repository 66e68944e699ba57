#!/bin/sh
# What became of a job of Slurm's (with accounting); other schedulers have commands of their own.
case $(sacct --jobs "$1" --allocations --noheader --format State 2> /dev/null | head -n 1) in
*COMPLETED*) echo success ;;
*FAILED* | *TIMEOUT* | *CANCELLED* | *OUT_OF_ME* | *NODE_FAIL* | *DEADLINE* | *PREEMPTED*) echo failed ;;
*) echo running ;;
esac
