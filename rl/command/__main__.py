"""`python -m flowsteer.rl.command`, for launchers that start a module."""

from flowsteer.rl.command.main import main

if __name__ == "__main__":
    main()
