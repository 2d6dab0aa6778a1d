"""The check of a batch's rows before any work: which can be served, how large they are, and what users should know."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from aspec.errors import UserError
from aspec.generation.params import SamplingParams
from aspec.generation.text.tokenizer import Tokenizer
from aspec.plan import Workload
from aspec.serving.batch_input import BatchFile, BatchRow
from aspec.serving.dispatch import check_room, encode, params_of
from aspec.serving.request_fields import as_json

UNSTATED_CONTEXT = 1 << 20  # tokens, where neither the model nor the user states a limit: no row is planned for more
MOST_NAMED = 3  # names of models that a note lists


@dataclass(slots=True)
class RowCheck:
    """Encodes every row once; mutable, because it counts."""

    tokenizer: Tokenizer
    defaults: SamplingParams
    context: int | None  # most tokens of a row; None: no limit is stated
    checked: int = 0  # rows that can be served
    longest: int = 2  # tokens of the longest row, prompt and new tokens together
    longest_id: str = ""  # its custom_id
    sampled: bool = False  # whether any token is drawn with noise
    _choices: int = 0
    _prompt_tokens: int = 0
    _new_tokens: int = 0
    _models: dict[str, None] = field(default_factory=dict)  # names that rows give, the first ones
    _variables: dict[str, None] = field(default_factory=dict)  # of the chat template, that it does not use

    def __call__(self, row: BatchRow) -> None:
        """Check a row and count it. Raises PromptError if it cannot be served."""
        request, limit = row.request, self.context or UNSTATED_CONTEXT
        count = len(encode(self.tokenizer, request))
        check_room(count, request.max_new_tokens, limit)
        params = params_of(self.tokenizer, request, self.defaults, seed=0)
        most = limit if params.max_length is None else min(limit, params.max_length)
        new = max(0, min(params.max_new_tokens, most - count))
        self.checked += 1
        if count + max(1, new) > self.longest:  # one token is free, even if none is asked for
            self.longest, self.longest_id = count + max(1, new), row.custom_id
        self.sampled = self.sampled or params.temperature > 0.0
        self._choices += request.num_choices
        self._prompt_tokens += request.num_choices * count
        self._new_tokens += request.num_choices * new
        if request.model is not None and len(self._models) <= MOST_NAMED:
            self._models[request.model] = None
        for name in request.template or ():
            if len(self._variables) <= MOST_NAMED and not self.tokenizer.template_uses(name):
                self._variables[name] = None

    def workload(self) -> Workload:
        """The mean row, for the planner."""
        choices = max(1, self._choices)
        mean_prompt, mean_new = round(self._prompt_tokens / choices), round(self._new_tokens / choices)
        return Workload(choices, max(1, mean_prompt), max(2, mean_new), sampled=self.sampled)

    def longest_row(self) -> str:
        """What to do if memory is too small for the longest row, as a sentence."""
        return (
            f"The context follows the longest row, {as_json(self.longest_id)}, of {self.longest} tokens: a lower "
            f"--max-context makes rows that ask for more error rows."
        )

    def notes(self, target: str) -> Iterator[str]:
        """What the rows say without an effect, in one line each."""
        others = [name for name in self._models if name not in (target, target.rstrip("/").rpartition("/")[2])]
        if others:
            yield f"rows name {_listed(others)} as their model; {target} serves them all"
        if self._variables:
            yield f"the chat template does not use {_listed(list(self._variables))}, which rows give"


def check_file(rows: BatchFile, check: RowCheck, *, strict: bool) -> None:
    """Check all rows of a file. Raises UserError if none of them can be served, or ``strict`` and not all of them."""
    rows.scan(check)
    if rows.refused and (strict or not check.checked):
        remedy = ", or leave out --strict: they become error rows then" if check.checked else ""
        raise UserError(rows.problems(f", so no row was served. Correct the file and run again{remedy}"))


def _listed(names: list[str]) -> str:
    more = " and others" if len(names) > MOST_NAMED else ""
    return ", ".join(map(as_json, names[:MOST_NAMED])) + more
