"""What the engine tells of a request: the text that its tokens bring, and whether it ends with them. Knows no steps."""

from __future__ import annotations

from engine.constraints import spoiled_by
from engine.errors import InvalidRequest
from engine.messages import FinishReason, PositionLogprobs, RequestOutput, TokenLogprob
from engine.request import Request
from engine.sampler import SampledToken
from engine.tokenizer import TokenDecoder


class Answers:
    """Changes requests' tokens, text and finish reason; whoever calls it frees what an ended one holds."""

    def __init__(self, tokenizer: TokenDecoder, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self.num_tokens = 0  # of all answers together

    def append(self, request: Request, token: SampledToken) -> RequestOutput:
        """The request's next token was sampled. A text that cannot be made of it raises."""
        params = request.params
        if params.max_tokens == 0:
            return self._tell(request, finish="length")
        request.token_ids.append(token.token_id)
        self.num_tokens += 1
        stop_reason: int | str | None = None
        finish: FinishReason | None = None
        text = ""
        matcher = request.matcher
        is_eos = token.token_id in self._eos_token_ids and (not params.ignore_eos or matcher is not None)
        if is_eos or token.token_id in params.stop_token_ids:
            finish = "stop"
            stop_reason = None if is_eos else token.token_id
        elif matcher is not None and not matcher.consume_token(token.token_id):
            return self.failed(request, spoiled_by(request))
        else:
            may_stop = request.num_output_tokens >= params.min_tokens
            text = request.detokenizer.push(token.token_id, may_stop=may_stop)
            if request.detokenizer.stop_string is not None or (matcher is not None and matcher.is_stopped()):
                finish = "stop"
            elif request.num_tokens >= request.max_num_tokens:
                finish = "length"
        if finish is not None:
            text += request.detokenizer.flush()
            if request.detokenizer.stop_string is not None:
                finish, stop_reason = "stop", request.detokenizer.stop_string
        return self._tell(request, text, [token], finish, stop_reason)

    def scored(self, request: Request) -> RequestOutput:
        """Its new scores of prompt tokens, and no token."""
        return self._tell(request)

    def failed(self, request: Request, error: str | InvalidRequest) -> RequestOutput:
        """Its end."""
        return self._tell(request, finish="error", error=error)

    def _tell(
        self,
        request: Request,
        text: str = "",
        tokens: list[SampledToken] | None = None,
        finish: FinishReason | None = None,
        stop_reason: int | str | None = None,
        error: str | InvalidRequest | None = None,
    ) -> RequestOutput:
        tokens = tokens or []
        if finish is not None:
            request.finish_reason = finish
        wants_logprobs = request.params.logprobs is not None
        scores, request.new_scores = request.new_scores, []
        return RequestOutput(
            request_id=request.request_id,
            text=text,
            token_ids=[token.token_id for token in tokens],
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=min(request.num_cached_tokens, request.num_prompt_tokens),
            num_output_tokens=request.num_output_tokens,
            logprobs=[self._named(token.logprobs) for token in tokens] if wants_logprobs else None,
            prompt_logprobs=[self._named(score) for score in scores] or None,
            finish_reason=finish,
            stop_reason=stop_reason,
            error=None if error is None else str(error),
            error_param=error.param if isinstance(error, InvalidRequest) else None,
            error_code=error.code if isinstance(error, InvalidRequest) else None,
        )

    def _named(self, logprobs: list[tuple[int, float]] | None) -> PositionLogprobs:
        assert logprobs is not None
        named = [
            TokenLogprob(token_id, logprob, self._tokenizer.token_bytes(token_id)) for token_id, logprob in logprobs
        ]
        return PositionLogprobs(named[0], named[1:])
