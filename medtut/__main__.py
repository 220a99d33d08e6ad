"""``python -m medtut`` is the ``medtut`` command."""

from medtut.cli import main

if __name__ == "__main__":
    main()
