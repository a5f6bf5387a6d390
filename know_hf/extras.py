"""Optional packages, which the extras of `pyproject.toml` install."""


def missing(needed_by: str, package: str, extra: str) -> ImportError:
    """Return the error for a package that is not installed; `package` may have the versions needed."""
    # From the clone, because the name may be another project's on the index.
    hint = f'in a clone of know_hf, run: pip install -c constraints.txt ".[{extra}]"'
    return ImportError(f"{needed_by} needs {package}; {hint}")
