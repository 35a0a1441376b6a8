"""Lists the commands."""

import ast
import pathlib
import sys


def commands() -> dict[str, str]:
    """What each is for, by the name that `python -m` takes."""
    found, here = {}, pathlib.Path(__file__).parent
    for path in sorted(p for pattern in ("[!_]*.py", "[!_]*/__main__.py") for p in here.glob(pattern)):
        name = (path.parent if path.stem == "__main__" else path).stem
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[f"{__package__}.{name}"] = about.partition("\n")[0]
    return found


if __name__ == "__main__":
    if unknown := [word for word in sys.argv[1:] if word not in ("-h", "-help", "--help")]:
        sys.stderr.write(
            f"{__package__}: unexpected {unknown[0]!r}; a command is python -m {__package__}.NAME, and python -m "
            f"{__package__} lists them\n"
        )
        sys.exit(2)
    print("Commands; each has --help:\n")
    for name, what in commands().items():
        print(f"python -m {name}\n    {what}")
