"""The keys of a config as a page: `python3 -m configs.table > docs/config.md`."""

from configs.default import all_keys

SECTIONS = ("config", "data", "training", "optim", "model", "sampling", "eval", "reports")

HEAD = """# The keys of a config

Each can be set in an experiment's file, `config.training.batch_size = 64`, and on the command line,
`--config.training.batch_size=64`. What is not in its range is refused before any work. A method,
network or source that is added to its registry can be named at once.
"""


def page() -> str:
    """The page, in Markdown: a table for each section of the config."""
    rows = {section: [] for section in SECTIONS}
    for name, key in all_keys().items():
        cells = (f"`{name}`", f"`{key.default!r}`", str(key), key.meaning)
        row = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        rows.setdefault(name.rpartition(".")[0] or "config", []).append(row)
    lines = [HEAD]
    for section, table in rows.items():
        lines += [
            f"\n## `{section}`\n",
            "| Key | Default | May be | Meaning |",
            "|---|---|---|---|",
        ]
        lines += table
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
