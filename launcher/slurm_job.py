"""The name by which jobs queued before this release call launcher.slurm.job."""

from launcher.slurm.job import main

if __name__ == "__main__":
    main()
