"""The name by which jobs queued before this release call launcher.drive.driver."""

from launcher.drive.driver import main

if __name__ == "__main__":
    main()
