"""Commands for checkpoints of other formats: import, export."""

from typing import Any

from rest_jax.commands.options import AddCommand, leave_accelerators_alone


def register(add: AddCommand) -> None:
    for name, command, text in (
        ("import", _import, "Import a checkpoint of T5X or Hugging Face. Its format is detected."),
        ("export", _export, "Export a checkpoint, such as MODEL_DIR/policy, to T5X or Hugging Face."),
    ):
        sub = add(name, command, text)
        sub.add_argument("source", metavar="SOURCE", help="a checkpoint of any format")
        sub.add_argument("dest", metavar="DEST", help="directory to write; must not exist")
        sub.add_argument("--gin_file", action="append", default=[], help="of the model; without it, it is found out")
        if name == "export":
            sub.add_argument("--format", required=True, choices=("t5x", "hugging_face"), dest="to")


def _import(options: Any) -> None:
    # Tensors pass through the host alone, like the next command's.
    leave_accelerators_alone()
    from rest_jax.checkpoints.commands import import_command

    print(import_command(options.source, options.dest, gin_files=options.gin_file, bindings=options.bindings))


def _export(options: Any) -> None:
    leave_accelerators_alone()
    from rest_jax.checkpoints.commands import export_command

    print(
        export_command(
            options.source, options.dest, to=options.to, gin_files=options.gin_file, bindings=options.bindings
        )
    )
