"""What clients may send to the service, and what is refused, with the status and the remedy. No server is in it."""

from __future__ import annotations

from collections.abc import Sequence
from secrets import compare_digest
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from badge_peft.serving.settings import Limits

Row = tuple[str, str | None]


class RequestError(Exception):
    """A request that is refused: the status of the answer, what is wrong and the remedy, and for 429 and 503 the
    seconds after which to try again."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class PredictRequest(BaseModel):
    """`POST /predict`."""

    model_config = ConfigDict(extra="forbid")
    inputs: StrictStr | list[StrictStr] | list[tuple[StrictStr, StrictStr]] = Field(
        description="A text, several, or pairs of texts."
    )
    tasks: list[StrictStr] | None = Field(None, description="Of a service of many tasks: which. None: all.")
    max_exit: StrictInt | None = Field(None, ge=0, description="No text of this request goes past this block.")
    all_scores: StrictBool = Field(False, description="Also say `scores`, of every label.")

    def rows(self) -> list[Row]:
        """The texts, each with its second text or None."""
        inputs: Sequence[Any] = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        return [(item, None) if isinstance(item, str) else (item[0], item[1]) for item in inputs]


class RerankRequest(BaseModel):
    """`POST /rerank`."""

    model_config = ConfigDict(extra="forbid")
    query: StrictStr
    texts: list[StrictStr]
    top_k: StrictInt | None = Field(
        None, ge=1, description="How many to return, best first. None: as many as calibrated."
    )
    return_text: StrictBool = False

    def rows(self) -> list[Row]:
        """The pairs."""
        return [(self.query, text) for text in self.texts]


class PolicyUpdate(BaseModel):
    """`PUT /policy`: what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")
    early_exit: dict[str, Any] | None = Field(None, description="Fields of EarlyExitConfig, for all tasks.")
    tasks: dict[StrictStr, dict[str, Any]] | None = Field(None, description="The same, for single tasks.")
    target: float | None = Field(None, description="Seconds, for the controller; 0 switches it off.")
    max_score_drop: float | None = Field(None, description="The controller's floor, from full depth.")
    reset_drift: StrictBool = Field(False, description="Take the alarm back, and watch anew.")


def shape_message(errors: Sequence[dict[str, Any]], content_type: str) -> str:
    """What is wrong with the shape of a body, in a line, without what the body holds."""
    if "json" not in content_type:
        return "the body is not declared as JSON: send the header Content-Type: application/json."
    if errors and errors[0]["type"] == "json_invalid":
        return f"the body is no JSON: {errors[0]['ctx']['error']} at character {errors[0]['loc'][1]}."
    parts: dict[str, str] = {}
    for error in errors:
        name = ".".join(str(part) for part in error["loc"][1:2]) or "body"
        chosen = name == "inputs" and error["type"] != "missing"
        parts[name] = "give a text, a list of texts, or a list of [text, pair]" if chosen else error["msg"]
    return "; ".join(f"{name}: {message}" for name, message in parts.items()) + ". The page /docs has the fields."


def check_rows(rows: Sequence[Row], limits: Limits) -> None:
    """Refuses a request without texts, with too many or too long ones, or with what is none: JSON can say what no
    tokenizer reads."""
    if not rows:
        raise RequestError(422, "inputs is empty: give at least one text.")
    if len(rows) > limits.rows:
        raise RequestError(413, f"{len(rows)} texts are more than the {limits.rows} of one request: send parts.")
    for number, row in enumerate(rows):
        whole = "".join(text or "" for text in row)
        if len(whole) > limits.characters:
            raise RequestError(
                413, f"text {number} has {len(whole)} characters, and {limits.characters} are allowed: shorten it."
            )
        try:
            whole.encode()
        except UnicodeEncodeError as error:
            message = f"text {number} has one half of a surrogate pair, which is no text: take it out."
            raise RequestError(422, message) from error


def check_tasks(tasks: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...] | None:
    """The tasks that a request asks for, of those that the service has; None where it has one adapter and no tasks."""
    if tasks is None:
        return tuple(known) or None
    if not known:
        raise RequestError(400, "this service has one adapter and no tasks: leave `tasks` out.")
    if not tasks or not set(tasks) <= set(known) or len(set(tasks)) < len(tasks):
        raise RequestError(400, f"tasks={list(tasks)} is not allowed: name some of {', '.join(known)}, each once.")
    return tuple(tasks)


def check_open(ending: bool) -> None:
    """Refuses what comes after the service has been told to end."""
    if ending:
        raise RequestError(503, "this service is ending: ask another one, or try again in a while.", retry_after=1)


def check_room(waiting: int, rows: int, limits: Limits) -> None:
    """Refuses what a replica could not answer soon."""
    if waiting and waiting + rows > limits.waiting_rows:
        raise RequestError(
            429, f"{waiting} texts are waiting, and {limits.waiting_rows} may: try again in a second.", retry_after=1
        )


def check_token(header: bytes | None, token: str | None) -> None:
    """Lets those pass who may change the policy; where the service has no token nobody may."""
    if not token:
        raise RequestError(
            403, "policy updates are disabled: start the service with BADGE_PEFT_TOKEN in its environment."
        )
    if header is None or not compare_digest(header, f"Bearer {token}".encode()):
        raise RequestError(401, "the bearer token is missing or wrong: send `Authorization: Bearer TOKEN`.")
