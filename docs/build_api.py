"""Writes docs/api.md from the docstrings of what fx_nvfp4 exports.

python docs/build_api.py          # writes
python docs/build_api.py --check  # exits with 1 if the page is not up to date
"""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fx_nvfp4

PAGE = Path(__file__).with_name("api.md")
HEAD = """# API reference

Generated from the docstrings by `python docs/build_api.py`: change those, not this page.

"""


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
        return 0
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    print("docs/api.md is not up to date: run python docs/build_api.py")
    return 1


def page() -> str:
    names = sorted(fx_nvfp4.__all__, key=lambda name: (isinstance(getattr(fx_nvfp4, name), ModuleType), name.lower()))
    contents = "".join(f"- [`{name}`](#{anchor(name)})\n" for name in names)
    return HEAD + contents + "".join(entry(name, getattr(fx_nvfp4, name)) for name in names)


def anchor(name: str) -> str:
    return f"fx_nvfp4{name}".lower()


def entry(name: str, value: Any) -> str:
    text = f"\n## fx_nvfp4.{name}\n\n"
    if isinstance(value, ModuleType):
        return text + "A module. " + prose(value) + "".join(members(value, f"{name}.", public_of(value)))
    text += signature(name, value) + prose(value)
    if inspect.isclass(value) and not issubclass(value, BaseException):
        text += "".join(members(value, f"{name}.", vars(value)))
    return text


def members(owner: Any, prefix: str, names: Any) -> list[str]:
    """What an owner defines itself and documents."""
    found = []
    for name in names:
        value = inspect.getattr_static(owner, name)
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        value = value.fget if isinstance(value, property) else getattr(value, "_init_fn", value)
        if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)) or not value.__doc__:
            continue
        found.append(f"\n### {prefix}{name}\n\n{signature(name, value)}{prose(value)}")
    return found


def public_of(module: ModuleType) -> list[str]:
    """Names by the module's own order; functions that were imported into it are documented where they are from."""
    names = getattr(module, "__all__", None) or vars(module)
    return [n for n in names if plain_module(inspect.getattr_static(module, n)).startswith(module.__name__)]


def plain_module(value: Any) -> str:
    return getattr(getattr(value, "_init_fn", value), "__module__", None) or ""


def signature(name: str, value: Any) -> str:
    try:
        parameters = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    if inspect.isclass(value) and issubclass(value, BaseException):
        return ""
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", f"{name}{parameters}")
    text = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", text)
    return f"```text\n{text}\n```\n\n"


def prose(value: Any) -> str:
    """A docstring as Markdown: sections become bold, their entries a list, roles code."""
    out: list[str] = []
    bullet: str | None = None  # what an entry of the section begins with; None outside of sections
    for line in (inspect.getdoc(value) or "").splitlines():
        if section := re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields):", line):
            out += [f"**{section[1]}**", ""]
            bullet = "" if section[1] in ("Returns", "Yields") else "- "
        elif bullet is not None and re.match(r" {4}\S", line):
            out.append(bullet + line.strip())
        elif bullet is not None and line.startswith("     "):
            out.append(" " * len(bullet) + line.strip())
        else:
            bullet = bullet if not line.strip() else None
            out.append(line)
    text = re.sub(r":[a-z:]+:`~?([^`]+)`", r"`\1`", "\n".join(out)).replace("``", "`")
    return text.rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
