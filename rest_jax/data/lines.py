"""Text files of a sentence a line."""

import gzip

from rest_jax import paths
from rest_jax.errors import UserError


def read_lines(path: str) -> list[str]:
    """Lines of a UTF-8 file, plain or *.gz, without their ends.

    Only a line feed ends a line: characters such as U+2028 stand inside sentences.

    Raises:
      UserError: it is missing or no UTF-8; names it.
    """
    file = paths.resolve(path)
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}. Give UTF-8 text with a sentence on each line.") from error
    return text.removesuffix("\n").split("\n")
