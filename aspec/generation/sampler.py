"""Drawing tokens with shared noise: the token at position t is a function of (seed, t) and the target alone.

token = argmax(processed logits + g), g = Gumbel noise over the vocabulary from an integer counter hash of (the
request's seed, t, token id). That is an exact draw from the processed distribution (the Gumbel-max trick), and it
does not depend on drafts, batches or plans. A draft that ranks with the same noise aims at the same token that the
target will draw (Daliri et al., "Coupling without communication and drafter-invariant speculative decoding").

Rules: this file keeps no state between draws; no row of a batch changes the draw of another row; filters keep the same
tokens as ``transformers``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper

from aspec.errors import InternalError, NoTokenError, NumericError
from aspec.generation.params import SamplingParams
from aspec.generation.penalties import Context, Penalties
from aspec.generation.processors import narrows, needs_processors, warpers_of
from aspec.io.pinned import upload

GREEDY_BELOW = 1e-5  # float32 logits cannot be divided by a lower temperature; the same limit as vLLM
SLACK = 1e-3  # in logits: far above the rounding of a float32 logsumexp, far too small to cost time
BLOCK = 1 << 17  # noise values computed at once on a CPU: three buffers of 512 KiB stay in its L2 cache
DEVICE_BLOCK = 1 << 20  # scores drawn at once on a device: few launches, and 4 MiB per buffer

# splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = (1 << 64) - 1
# triple32, the best known 32-bit bijection of its size (Wellons, "Prospecting for hash functions", 2018).
ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
LAST_SHIFT = 14

NO_TOKEN = -1  # the draw at a position whose logits are not numbers

# -- noise -----------------------------------------------------------------------------------------------------


def derive_seed(seed: int, index: int) -> int:
    """The seed of prompt ``index`` of a run with one seed, in 0 .. 2^63 - 1.

    It depends on the index (or custom id) of the prompt, never on its row in a batch. Index 0 is no exception.
    """
    return _mix(_mix(seed + GOLDEN) ^ _mix(index + MIX_1)) >> 1


def gumbel(
    seed: int, positions: Sequence[int] | torch.Tensor, vocab_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard Gumbel noise [N, V] float32 for N absolute positions (a sequence, or a [N] int64 tensor).

    The value for (seed, position, token) does not depend on the batch, its order or the vocabulary's size.
    """
    whole = [int(position) for position in (positions.tolist() if isinstance(positions, torch.Tensor) else positions)]
    spread = _spread(torch.arange(vocab_size, dtype=torch.int32, device=device))
    out = torch.empty(len(whole), vocab_size, dtype=torch.float32, device=device)
    together = max(1, (BLOCK if out.device.type == "cpu" else DEVICE_BLOCK) // max(1, vocab_size))
    for start in range(0, len(whole), together):
        stop = start + together
        _to_gumbel(_keyed(spread, seed, whole[start:stop]), out[start:stop])
    return out


def noise_bits(seed: int, positions: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
    """The 32-bit integers [N, K] int32 behind the noise of token ids [K] int32, equal on every device.

    Every (seed, position) has its own bijection of the 32-bit integers: the three rounds of triple32 on the token
    id, keyed before the second and before the third round with the halves of 64 bits from splitmix64.
    """
    return _keyed(_spread(tokens), seed, positions)


def _spread(tokens: torch.Tensor) -> torch.Tensor:
    """The first round, which needs no key: one result serves all positions."""
    shift, factor = ROUNDS[0]
    return _xor_shift(tokens.clone(), shift, torch.empty_like(tokens)).mul_(_signed(factor))


def _keyed(spread: torch.Tensor, seed: int, positions: Sequence[int]) -> torch.Tensor:
    base = _mix(seed + GOLDEN)
    keys = [_mix(base + GOLDEN * (position + 1)) for position in positions]
    halves = [[_signed(key & 0xFFFFFFFF) for key in keys], [_signed(key >> 32) for key in keys]]
    low, high = upload(torch.tensor(halves, dtype=torch.int32), spread.device)[:, :, None]
    bits = spread ^ low
    scratch = torch.empty_like(bits)
    _xor_shift(bits, ROUNDS[1][0], scratch).mul_(_signed(ROUNDS[1][1])).bitwise_xor_(high)
    _xor_shift(bits, ROUNDS[2][0], scratch).mul_(_signed(ROUNDS[2][1]))
    return _xor_shift(bits, LAST_SHIFT, scratch)


def _to_gumbel(bits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """-log(-log(1 - v)) into ``out`` float32, where v = (bits modulo 2^32 + 0.5) / 2^32 is uniform in (0, 1).

    v is small if the noise is large, so float32 resolves the tail that wins an argmax: the largest value is
    about 22.9 and all 2^32 levels count. The other end, below -2.8, never wins; there v stops at 1 - 2^-24.
    """
    minus_v = out.copy_(bits).add_(0.5).mul_(-(2.0**-32))
    minus_v.sub_(minus_v.ceil()).clamp_(min=2.0**-24 - 1)
    return minus_v.log1p_().neg_().log_().neg_()


def _xor_shift(x: torch.Tensor, shift: int, scratch: torch.Tensor) -> torch.Tensor:
    """x ^= x >> shift on unsigned bits, in place; torch has only signed shifts."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def _mix(x: int) -> int:
    """The finaliser of splitmix64, modulo 2^64."""
    x &= MASK
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """An unsigned 32-bit integer as torch's signed int32."""
    return x - (1 << 32) if x >> 31 else x


# -- draws -----------------------------------------------------------------------------------------------------


class Sampler:
    """The draws of one request, for the target and any draft.

    Processors and penalties come first. Temperature and filters keep the same tokens as the warpers of
    ``transformers``, in its order. For top-k, top-p and min-p a row is first narrowed to the ids that can survive
    (top-k does only this), so no sort covers a whole vocabulary.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.greedy = params.temperature < GREEDY_BELOW
        self.penalties = Penalties.of(params)
        self._seed = int(params.seed)
        self._top_k, self._top_p, self._min_p = int(params.top_k), float(params.top_p), float(params.min_p)
        temperature = float(params.temperature)
        self._temperature = None if self.greedy or temperature == 1 else TemperatureLogitsWarper(temperature)
        self._warpers, self._narrows = warpers_of(params), narrows(params)
        self.temperature = 1.0 if self.greedy else temperature
        self._reads_context = self.penalties is not None or needs_processors(params)
        self.shares_argmax = self.greedy and not self._reads_context  # its draws are the largest raw logits

    def noise(
        self, positions: Sequence[int], vocab_size: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor | None:
        """The Gumbel noise [N, V] float32 that the draws at N absolute positions add; None if greedy."""
        return None if self.greedy else gumbel(self._seed, positions, vocab_size, device)

    def draw(
        self,
        logits: torch.Tensor,
        positions: Sequence[int],
        limit: int | None = None,
        context: Context | None = None,
    ) -> list[int]:
        """The tokens at absolute ``positions`` [N] from logits [N, V] of any float dtype; ties go to the lowest id.

        Ids from ``limit`` on are never drawn. ``context`` has a path for each of the N positions; processors and
        penalties require it, and only they read it. Raises NumericError if a row holds NaN or +inf, or only -inf.
        """
        logits = self.processed(logits[..., :limit], context)
        if self.greedy:
            return _draw_greedy(logits, positions)
        if logits.device.type != "cpu":
            return self._draw_in_blocks(logits, positions)
        scores = self._scores(logits, positions)
        if not self._narrows:
            scores = torch.cat([self._warped(row[None]) for row in scores]) if len(scores) else scores
        elif self._filters(scores.shape[-1]):
            drawn = [self._draw_row(row, at) for row, at in zip(scores, positions, strict=True)]
            return [int(token) for token in torch.stack(drawn).tolist()] if drawn else []
        return [int(token) for token in self._draw_all(scores, positions).tolist()]

    def _scores(self, logits: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Scores [N, V] float32 at the request's temperature."""
        scores = logits.float()
        _check(scores.amax(-1), positions)
        return scores if self._temperature is None else self._temperature(None, scores)

    def _draw_in_blocks(self, logits: torch.Tensor, positions: Sequence[int]) -> list[int]:
        """The same draws as ``draw``, fast on a device: many rows in few launches, a few buffers of DEVICE_BLOCK."""
        rows, drawn = max(1, DEVICE_BLOCK // logits.shape[-1]), []
        for start in range(0, len(logits), rows):
            own = positions[start : start + rows]
            drawn.append(self._draw_all(self._warped(self._scores(logits[start : start + rows], own)), own))
        return [int(token) for token in torch.cat(drawn).tolist()] if drawn else []

    def _warped(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [N, V] float32, -inf for tokens that a filter removes."""
        for warper in self._warpers:
            scores = warper(None, scores)
        return scores

    def _draw_all(self, scores: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Token ids [N] int64 from processed scores [N, V]."""
        noise = gumbel(self._seed, positions, scores.shape[-1], scores.device)
        return noise.add_(scores).max(-1).indices

    def processed(self, logits: torch.Tensor, context: Context | None) -> torch.Tensor:
        """A processed copy [N, V] float32 of raw logits [N, V]; without processors and penalties the same tensor.

        Drafts also rank with these logits, both their draws and the children of tree nodes. Raises NoTokenError if no
        token is left at a position, and InternalError if ``context`` has no path per position.
        """
        if not self._reads_context:
            return logits
        if context is None or len(context.paths) != len(logits):
            found = "none" if context is None else len(context.paths)
            raise InternalError(f"penalties need a path for each of {len(logits)} positions, found {found}.")
        scores, processors = logits.to(torch.float32, copy=True), context.processors
        if processors is not None:
            scores = processors.bias(scores, context.tokens, context.paths)
        if self.penalties is not None:
            self.penalties.apply(scores, context)
        if processors is not None:
            scores = processors.apply(scores, context.tokens, context.paths)
            empty = scores.amax(-1) == -torch.inf
            if bool(empty.any()) and bool((logits[empty].amax(-1) > -torch.inf).any()):
                raise NoTokenError(
                    "the request's parameters rule every token out: expected one that may follow the text. Remove "
                    "suppress_tokens, bad_words_ids, no_repeat_ngram_size, response_format or what else forbids "
                    "tokens, from the request or from generation_config.json."
                )
        return scores

    def scores(self, logits: torch.Tensor, position: int, context: Context | None = None) -> torch.Tensor:
        """The scores [V] float32 of one absolute position, from its raw logits [V]; a draw takes the largest.

        In nats: processed logits, plus the noise unless greedy; -inf for tokens that a filter removes.
        """
        scores = self.processed(logits[None], context)[0].float()
        if self.greedy:
            return scores
        if self._temperature is not None:
            scores = self._temperature(None, scores)
        if not self._narrows:
            scores = self._warped(scores[None])[0]
        elif self._filters(len(scores)):
            ids, kept = self._survivors(scores)
            scores = torch.full_like(scores, -torch.inf).scatter_(0, ids, kept)
        return scores + gumbel(self._seed, [position], len(scores), scores.device)[0]

    def _filters(self, num_ids: int) -> bool:
        return self._top_p < 1 or self._min_p > 0 or 0 < self._top_k < num_ids

    def _draw_row(self, scores: torch.Tensor, position: int) -> torch.Tensor:
        """One token id [] int64 from scores [V] float32, noise computed for the survivors only."""
        ids, kept = self._survivors(scores)
        bits = noise_bits(self._seed, [position], ids.int())[0]
        return ids[_to_gumbel(bits, torch.empty_like(kept)).add_(kept).max(-1).indices]

    def _survivors(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [K] int64, ascending, and processed scores [K]; tokens that the warpers remove are absent or -inf."""
        num_ids, share = scores.shape[-1], 1.0
        if 0 < self._top_k < num_ids:
            ids = (scores >= scores.topk(self._top_k).values[-1]).nonzero()[:, 0]  # ties stay, as in transformers
        elif self._top_p < 1:
            # Tokens below (1 - top_p) / V sum to less than the share that top-p removes: it removes all of them.
            total = scores.logsumexp(-1)
            ids = (scores >= total + (log((1 - self._top_p) / num_ids) - SLACK)).nonzero()[:, 0]
            share = float((scores[ids].logsumexp(-1) - total).exp())
        else:
            ids = (scores >= scores.amax(-1) + (log(self._min_p) - SLACK)).nonzero()[:, 0]
        kept = scores[ids][None]
        if self._top_p < 1:
            kept = TopPLogitsWarper(min(1.0, self._top_p / share))(None, kept)
        if self._min_p > 0:
            kept = MinPLogitsWarper(self._min_p)(None, kept)
        return ids, kept[0]


def draw_rows(
    samplers: Sequence[Sampler],
    logits: torch.Tensor,
    positions: Sequence[Sequence[int]],
    limit: int | None = None,
    contexts: Sequence[Context | None] | None = None,
    errors: dict[tuple[int, int], NumericError] | None = None,
) -> list[list[int]]:
    """Draw for every row of logits [B, T, V] at its own positions, which belong to the first columns of the row.

    Columns beyond a row's positions are padding: neither drawn nor checked. Ids from ``limit`` on are never drawn
    (a draft's vocabulary may be padded further than the target's). ``contexts[b]`` has a path for each of the row's
    positions; rows without processors and penalties need none. All such rows that are greedy share one argmax.
    ``errors`` receives the NumericError of every (row, column) whose logits are not numbers, and NO_TOKEN is drawn
    there; all other draws are unchanged. Without ``errors`` the NumericError is raised.
    """
    drawn: list[list[int]] = [[] for _ in samplers]
    greedy = [index for index, sampler in enumerate(samplers) if sampler.shares_argmax]
    if greedy:
        rows = logits if len(greedy) == len(samplers) else logits[greedy]
        best, tokens = rows[..., :limit].max(-1)
        values, ids = best.tolist(), tokens.tolist()
        for index, row_values, row_ids in zip(greedy, values, ids, strict=True):
            wanted = positions[index]
            drawn[index] = row_ids[: len(wanted)]
            try:
                _check_values(row_values[: len(wanted)], wanted)
            except NumericError:
                if errors is None:
                    raise
                drawn[index] = _draw_numbers(samplers[index], index, logits, wanted, limit, None, errors)
    for index, sampler in enumerate(samplers):
        if not sampler.shares_argmax:
            wanted = positions[index]
            context = contexts[index] if contexts is not None else None
            try:
                drawn[index] = sampler.draw(logits[index, : len(wanted)], wanted, limit, context)
            except NumericError:
                if errors is None:
                    raise
                drawn[index] = _draw_numbers(sampler, index, logits, wanted, limit, context, errors)
    return drawn


def _draw_numbers(
    sampler: Sampler,
    index: int,
    logits: torch.Tensor,
    positions: Sequence[int],
    limit: int | None,
    context: Context | None,
    errors: dict[tuple[int, int], NumericError],
) -> list[int]:
    """The draws of row ``index`` one by one, NO_TOKEN if its logits are not numbers."""
    drawn: list[int] = []
    for column, position in enumerate(positions):
        own = None if context is None else context.at(column)
        try:
            drawn += sampler.draw(logits[index, column : column + 1], [position], limit, own)
        except NumericError as error:
            errors[index, column] = error
            drawn.append(NO_TOKEN)
    return drawn


def _draw_greedy(logits: torch.Tensor, positions: Sequence[int]) -> list[int]:
    best, tokens = logits.max(-1)  # the first of equal maxima, or NaN if there is one: documented by torch
    _check(best, positions)
    return [int(token) for token in tokens.tolist()]


def _check(best: torch.Tensor, positions: Sequence[int]) -> None:
    """Raise NumericError unless every row's largest logit [N] is a finite number."""
    if not bool(torch.isfinite(best).all()):
        _check_values(best.tolist(), positions)


def _check_values(best: Sequence[float], positions: Sequence[int]) -> None:
    for value, position in zip(best, positions, strict=True):
        if not abs(value) < float("inf"):
            raise NumericError(
                f"the model's largest logit for position {position} is {value}: expected a finite number. The weights "
                f"are damaged, or they overflow in this dtype: verify the checkpoint's files, or try --dtype float32."
            )


# -- logprobs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A drawn token, the log of its probability under the model, and the likeliest tokens at its position.

    ``top``: (token, logprob) pairs, likeliest first, equal ones by ascending id; the drawn token may be among them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], num_top: int = 0) -> list[TokenLogprob]:
    """Natural logprobs of drawn ``tokens`` [N] and of the ``num_top`` likeliest, from logits [N, V] of any float dtype.

    They are the model's own: log-softmax of the raw logits in float32, before penalties, temperature and filters
    (what vLLM calls ``raw_logprobs``). ``top`` is shorter if fewer tokens are possible. Pass only emitted
    tokens: every row costs a log-softmax. A row's result does not depend on the others.
    """
    return [_token_logprob(row.float(), token, num_top) for row, token in zip(logits, tokens, strict=True)]


def _token_logprob(row: torch.Tensor, token: int, num_top: int) -> TokenLogprob:
    """One position, from logits [V] float32; rows go one by one, so that the other rows do not change a sum."""
    logprobs = row.log_softmax(-1)
    num_top = min(num_top, len(row))
    if num_top == 0:
        return TokenLogprob(token, float(logprobs[token]))
    least = row.topk(num_top).values[-1]
    ids = ((row >= least) & (row > -torch.inf)).nonzero()[:, 0]  # with all equals of the last: topk picks any
    ids = ids[row[ids].sort(descending=True, stable=True).indices[:num_top]]
    drawn, *values = logprobs[torch.cat([ids.new_tensor([token]), ids])].tolist()
    return TokenLogprob(token, drawn, tuple(zip(ids.tolist(), values, strict=True)))
