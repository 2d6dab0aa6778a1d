"""A grammar as one of a request's parameters; standard library only."""

from dataclasses import dataclass
from typing import Literal

WHITESPACE = (
    r" {1,4}|\r?\n[ \t]{0,32}"  # between the parts of a JSON text; without a limit a weak model writes nothing else
)

Form = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """All that the text of a request may be: what a JSON schema, a regular expression or a Lark grammar describes."""

    form: Form
    text: str

    def __repr__(self) -> str:
        return f"a grammar of form {self.form}"


ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')
