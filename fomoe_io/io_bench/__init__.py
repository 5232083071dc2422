"""`fomoe-bench io`: jobs, runs and reports in fio's terms."""
