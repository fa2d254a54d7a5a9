"""The answer of `/v1/responses`: engine events become stream events, of which the last holds the whole response.

A response is a message with the text, if any, and then the calls; each is added, grows and is done before the next.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from runtime.openai.answer import AnswerChunk, TextCall, WireAnswer, call_reader, to_chat_token
from runtime.openai.answer_types import ChatToken, InputOutputUsage, to_input_output_usage
from runtime.openai.tool_calls import CallDelta, ToolDelta
from runtime.openai.wire import answer_type
from runtime.requests import Event, Failed, Finished, FinishReason, TextDelta, Usage

from .request import ParsedResponse

ItemStatus = Literal["in_progress", "completed", "incomplete"]


@answer_type
class OutputText(TypedDict):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatToken]


@answer_type
class OutputMessage(TypedDict):
    """A message of the model."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


@answer_type
class OutputCall(TypedDict):
    """A call of the model."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputCall


@answer_type
class IncompleteDetails(TypedDict):
    """The limit that ended the answer."""

    reason: Literal["max_output_tokens"]


@answer_type
class ResponseError(TypedDict):
    """The error that ended a stream."""

    code: Literal["server_error"]
    message: str


@answer_type
class ResponseText(TypedDict):
    """The format of the text, as the request gave it."""

    format: dict[str, Any]


@answer_type
class Response(TypedDict):
    """The answer of `/v1/responses`."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: NotRequired[int]
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: InputOutputUsage | None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    text: ResponseText
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    metadata: dict[str, str]
    previous_response_id: None
    background: Literal[False]
    store: Literal[False]
    truncation: Literal["auto", "disabled"]


@answer_type
class ResponseEvent(TypedDict):
    """The beginning or the end of a response; the last event holds it whole."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    sequence_number: int
    response: Response


@answer_type
class ItemEvent(TypedDict):
    """An item begins or is whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


@answer_type
class PartEvent(TypedDict):
    """The text of a message begins or is whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


@answer_type
class TextDeltaEvent(TypedDict):
    """More text."""

    type: Literal["response.output_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatToken]


@answer_type
class TextDoneEvent(TypedDict):
    """The whole text."""

    type: Literal["response.output_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatToken]


@answer_type
class ArgumentsDeltaEvent(TypedDict):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


@answer_type
class ArgumentsDoneEvent(TypedDict):
    """A call's whole arguments."""

    type: Literal["response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


ResponseChunk = (
    ResponseEvent | ItemEvent | PartEvent | TextDeltaEvent | TextDoneEvent | ArgumentsDeltaEvent | ArgumentsDoneEvent
)
"""An event's data in a streamed response, which is named by its `type`."""


@dataclass(frozen=True, slots=True)
class ResponseCall:
    """A request for a response that became `call`, which has one choice."""

    call: TextCall
    body: ParsedResponse

    @property
    def id(self) -> str:
        """The response's id."""
        return "resp_" + self._number

    @property
    def _number(self) -> str:
        return self.call.id.rpartition("-")[2]

    def item_id(self, kind: str, index: int) -> str:
        """The id of an output item."""
        return f"{kind}_{self._number}{index}"


@dataclass(slots=True)
class _Open:
    """The output item that is being written."""

    index: int
    item: dict[str, Any]
    pieces: list[str] = field(default_factory=list)
    logprobs: list[ChatToken] = field(default_factory=list)


class ResponseAnswer(WireAnswer):
    """The answer to a request for a response: its chunks are the stream's events, of which the last holds it whole."""

    def __init__(self, asked: ResponseCall, clock_s: Callable[[], float]) -> None:
        """`clock_s` gives the seconds since 1970."""
        self._asked = asked
        self._clock_s = clock_s
        self._reader = call_reader(asked.call, 0)
        self._output: list[dict[str, Any]] = []
        self._open: _Open | None = None
        self._number = 0
        self._untold: list[ChatToken] = []
        self._ended: dict[str, Any] = {"status": "in_progress"}
        self._usage: Usage | None = None

    def begin(self) -> Iterable[AnswerChunk]:
        """Announce the response, still empty."""
        return [self._event(f"response.{name}", response=self.response()) for name in ("created", "in_progress")]

    def feed(self, event: Event) -> Iterable[AnswerChunk]:
        """Return the stream's events that show `event`. Raises the error of a `Failed`."""
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return self._finish(event.reason, event.usage)
        assert isinstance(event, TextDelta), "a call for text has been given scores"
        told = ToolDelta(event.text) if self._reader is None else self._reader.feed(event.text)
        self._untold += [to_chat_token(token) for token in event.logprobs]
        return self._tell(told)

    def fail(self, error: Mapping[str, Any]) -> Iterable[AnswerChunk]:
        """End the stream with `response.failed`, which has only one code for every error."""
        self._ended = {"status": "failed", "error": {"code": "server_error", "message": error["error"]["message"]}}
        return [self._event("response.failed", response=self.response())]

    def response(self) -> dict[str, Any]:
        """Return the response as far as it has come."""
        call, own, chat = self._asked.call, self._asked.body.own, self._asked.body.chat
        params = call.requests[0].params
        response: dict[str, Any] = {
            "id": self._asked.id,
            "object": "response",
            "created_at": call.created_s,
            "model": call.model,
            "error": None,
            "incomplete_details": None,
            "output": list(self._output),
            "usage": None if self._usage is None else to_input_output_usage(self._usage),
        }
        response |= {
            "instructions": own.instructions,
            "max_output_tokens": own.max_output_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_logprobs": own.top_logprobs or 0,
            "text": {"format": own.text.format or {"type": "text"}},
            "tools": [{"strict": None, "parameters": None} | tool for tool in own.tools],
            "tool_choice": own.tool_choice or "auto",
            "parallel_tool_calls": chat.get("parallel_tool_calls", True),
            "metadata": own.metadata,
            "truncation": own.truncation,
        }
        nothing = {"previous_response_id": None, "background": False, "store": False}
        return response | nothing | self._ended

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number} | fields

    def _tell(self, told: ToolDelta) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if told.content:
            events += [*self._open_message(), *self._more_text(told.content)]
        for delta in told.calls:
            events += self._more_call(delta)
        return events

    def _open_message(self) -> list[dict[str, Any]]:
        if self._open is not None:
            return []
        item = {"id": self._asked.item_id("msg", 0), "type": "message", "role": "assistant"}
        events = self._add(item | {"status": "in_progress", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [*events, self._at("response.content_part.added", content_index=0, part=part)]

    def _more_text(self, text: str) -> list[dict[str, Any]]:
        assert self._open is not None
        self._open.pieces.append(text)
        logprobs, self._untold = self._untold, []
        self._open.logprobs += logprobs
        return [self._at("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _more_call(self, delta: CallDelta) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if delta.name is not None:
            events += self._close("completed")
            item = {"id": self._asked.item_id("fc", delta.index), "type": "function_call", "status": "in_progress"}
            events += self._add(item | {"call_id": delta.id, "name": delta.name, "arguments": ""})
        assert self._open is not None
        if delta.arguments:
            self._open.pieces.append(delta.arguments)
            events.append(self._at("response.function_call_arguments.delta", delta=delta.arguments))
        return events

    def _add(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        self._open = _Open(len(self._output), item)
        return [self._event("response.output_item.added", output_index=self._open.index, item=dict(item))]

    def _at(self, kind: str, **fields: Any) -> dict[str, Any]:
        assert self._open is not None
        return self._event(kind, item_id=self._open.item["id"], output_index=self._open.index, **fields)

    def _close(self, status: str) -> list[dict[str, Any]]:
        """End the item that is open, if one is."""
        if self._open is None:
            return []
        opened, whole = self._open, "".join(self._open.pieces)
        item = opened.item | {"status": status}
        if item["type"] == "message":
            logprobs, self._untold = opened.logprobs + self._untold, []
            part = {"type": "output_text", "text": whole, "annotations": [], "logprobs": logprobs}
            events = [self._at("response.output_text.done", content_index=0, text=whole, logprobs=logprobs)]
            events.append(self._at("response.content_part.done", content_index=0, part=part))
            item["content"] = [part]
        else:
            item["arguments"] = whole
            events = [self._at("response.function_call_arguments.done", name=item["name"], arguments=whole)]
        self._open = None
        self._output.append(item)
        return [*events, self._event("response.output_item.done", output_index=opened.index, item=item)]

    def _finish(self, reason: FinishReason, usage: Usage) -> list[dict[str, Any]]:
        held = "" if self._reader is None else self._reader.finish()
        events = self._tell(ToolDelta(held))
        if self._open is None and not self._output:
            events += self._open_message()
        self._usage = usage
        if reason == "length":
            events += self._close("incomplete")
            self._ended = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        else:
            events += self._close("completed")
            self._ended = {"status": "completed", "completed_at": int(self._clock_s())}
        return [*events, self._event(f"response.{self._ended['status']}", response=self.response())]
