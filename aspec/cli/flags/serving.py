"""The flags of ``aspec serve``."""

import math
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from aspec.cli.flags.groups import DebugFlags, EngineFlags, ModelFlags, QuietFlags, RowFlags, SamplingFlags
from aspec.cli.flags.options import AUTO, OUTPUT, PLACE, SAMPLING, count_or_auto, option
from aspec.options import EngineOptions
from aspec.plan import Workload

SERVER = "Server"
REQUESTS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 512, 256  # at once, and of each, for which a server is planned


@dataclass(frozen=True)
class ServeFlags(RowFlags, EngineFlags, SamplingFlags, DebugFlags, QuietFlags, ModelFlags):
    """Where to listen, who may ask, and how much is taken on. Sampling flags are for requests that do not say."""

    host: Annotated[
        str,
        option(
            SERVER, "The address to listen on; 0.0.0.0 is every one of this machine, and needs --api-key.", "--host"
        ),
    ] = "127.0.0.1"
    port: Annotated[int, option(SERVER, "The port; 0 takes a free one.", "--port", min=0, max=65535)] = 8000
    api_key: Annotated[
        str | None,
        option(
            SERVER,
            "The key that clients send (Authorization: Bearer KEY). The variable keeps it out of the list of "
            "processes.",
            "--api-key",
            envvar="ASPEC_API_KEY",
            metavar="KEY",
        ),
    ] = None
    no_auth: Annotated[
        bool, option(SERVER, "Let everybody in who reaches an address beyond this machine.", "--no-auth")
    ] = False
    served_model_name: Annotated[
        list[str] | None,
        option(
            SERVER,
            "The model's name for clients; repeat it for further names. Default: the name of the target.",
            "--served-model-name",
            metavar="NAME",
        ),
    ] = None
    max_batch: Annotated[
        int,
        option(
            PLACE,
            "Number of answers that share a pass. auto: aspec searches for the fastest plan for several clients.",
            "--max-batch",
            "--batch-size",
            parser=count_or_auto,
            metavar="auto|N",
        ),
    ] = "auto"  # type: ignore[assignment]  # typer parses the default too
    seed: Annotated[
        int | None, option(SAMPLING, "The seed of requests that give none. Default: another one for every request.")
    ] = None  # type: ignore[assignment]
    max_queue: Annotated[
        int, option(SERVER, "Answers that may wait for a row; further ones get status 429.", "--max-queue", min=0)
    ] = 128
    stop_after: Annotated[
        float,
        option(
            SERVER, "Seconds that running answers have to finish after a signal.", "--stop-after", min=0.0, metavar="S"
        ),
    ] = 30.0
    log_requests: Annotated[
        bool,
        option(OUTPUT, "Print a line for every request: method, path, status, seconds. Never a key.", "--log-requests"),
    ] = False
    quiet: Annotated[bool, option(OUTPUT, "Print only errors.", "--quiet", "-q")] = False
    max_context: Annotated[
        int | None,
        option(
            PLACE,
            "Maximum tokens of a request, prompt included; longer ones are refused. Default: 4096, less if memory is "
            "short.",
            min=2,
        ),
    ] = None

    def options(self) -> EngineOptions:
        """The engine's options, for several requests of a usual length. Raises UserError for invalid values."""
        rows = REQUESTS if self.max_batch == AUTO else self.max_batch
        share = min(1.0, (self.max_context or math.inf) / (PROMPT_TOKENS + ANSWER_TOKENS))
        prompt, answer = (max(1, int(share * usual)) for usual in (PROMPT_TOKENS, ANSWER_TOKENS))
        work = Workload(max(1, rows), prompt, max(2, answer), sampled=self.temperature != 0.0)
        return replace(super().options(), workload=work)

    def check(self) -> None:
        """Refuse to be open to others without a key. Raises typer.BadParameter."""
        super().check()
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.api_key and not self.no_auth:
            raise typer.BadParameter(
                "others can reach this address: give --api-key KEY, or --no-auth to let everybody in",
                param_hint="--host",
            )
        if self.api_key == "":
            raise typer.BadParameter("the key is empty", param_hint="--api-key")
