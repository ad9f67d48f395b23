"""The name by which jobs queued before this release call launcher.slurm.rank."""

from launcher.slurm.rank import main

if __name__ == "__main__":
    main()
