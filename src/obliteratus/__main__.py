"""Start the command line. An interrupt is heard from the first moment on, while libraries are still being imported."""

from obliteratus.core.interrupt import leave_on_interrupt


def main() -> None:
    """Run the command line."""
    leave_on_interrupt()
    from obliteratus.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
