"""The documents that rooms exchange: versioned, digested, written whole or not at all.

Every document is JSON with a ``kind``, a ``version`` and a ``digest`` over all its other fields, so that a changed
field is noticed before anything is done with it. Paths in a document are relative to its root (the folder it lies
in, unless the user names another).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, sha256, write_atomic
from curate.core.sources import Source
from curate.core.terminal import quoted


class Part(BaseModel):
    """A piece of a document: unknown fields are refused, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Document(Part):
    """A JSON document with a kind, a version and a digest."""

    KIND: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1
    CALLED: ClassVar[str] = ""
    """What people call it."""
    WRITTEN_BY: ClassVar[str] = ""
    """The command that writes one."""

    @property
    def digest(self) -> str:
        """SHA-256 over all fields."""
        return sha256(canonical_json({"kind": self.KIND, "version": self.VERSION, **self.model_dump(mode="json")}))

    def to_bytes(self) -> bytes:
        """Return the file's content: the same fields give the same bytes."""
        body = {"kind": self.KIND, "version": self.VERSION, "digest": self.digest, **self.model_dump(mode="json")}
        return json.dumps(body, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON Schema of the file, as published in docs/schemas/."""
        schema = cls.model_json_schema()
        own = {"kind": {"const": cls.KIND}, "version": {"const": cls.VERSION},
               "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"}}
        schema["properties"] = own | schema["properties"]
        schema["required"] = [*own, *schema.get("required", [])]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def write(self, path: Path) -> None:
        """Write the document atomically."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a document and check kind, version, fields and digest; ``UserError`` says what is wrong."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise cls.none_at(path) from None
        except OSError as err:
            raise UserError(f"{path} is no readable JSON document: {err}.", "Make it again.", Exit.INTEGRITY) from None
        return cls.from_bytes(data, str(path))

    @classmethod
    def none_at(cls, path: Path) -> UserError:
        """Return the error for a document that is not there."""
        written = f", or write one with: {cls.WRITTEN_BY}" if cls.WRITTEN_BY else "."
        return UserError(f"There is no {cls.CALLED or cls.KIND} at {path}.", f"Check the path{written}")

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "document") -> Self:
        """Read a document from a file's content; see ``read``."""
        try:
            body = json.loads(data.decode())
        except (ValueError, RecursionError) as err:
            raise UserError(f"{name} is no readable JSON document: {err}.", "Make it again.", Exit.INTEGRITY) from None
        return cls.from_body(body, name)

    @classmethod
    def from_body(cls, body: Any, name: str = "document") -> Self:
        """Check a parsed document; see ``read``."""
        if not isinstance(body, dict) or body.get("kind") != cls.KIND:
            raise UserError(f"{name} is not a {cls.KIND} document.", "Give the file that the tool wrote.",
                            Exit.INTEGRITY)
        if body.get("version") != cls.VERSION and _signed(body):
            raise UserError(f"{name} has version {body.get('version')!r}; this safeset reads {cls.VERSION}.",
                            "Make it again with this version.", Exit.INCOMPATIBLE)
        fields = {k: v for k, v in body.items() if k not in ("kind", "version", "digest")}
        try:
            document = cls.model_validate(fields)
            found = sha256(canonical_json({k: v for k, v in body.items() if k != "digest"}))
        except ValidationError as err:
            first = err.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{name}: field '{where}': {first['msg']}.", "Make the document again.",
                            Exit.INTEGRITY) from None
        except (ValueError, RecursionError) as err:
            raise UserError(f"{name} holds a value that no document has: {err}.", "Make the document again.",
                            Exit.INTEGRITY) from None
        if not body.get("digest") == found == document.digest:
            raise UserError(f"{name} was changed after it was written: its digest does not match its fields.",
                            "Make it again, or restore the original.", Exit.INTEGRITY)
        return document


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    """Return fields without one that is None: documents of before it was there keep their digest."""
    return {k: v for k, v in body.items() if k != name or v is not None}


def _signed(body: dict[str, Any]) -> bool:
    """Return whether a parsed document's digest is that of its other fields."""
    try:
        return body.get("digest") == sha256(canonical_json({k: v for k, v in body.items() if k != "digest"}))
    except (ValueError, RecursionError):
        return False


class ModelIdentity(Part):
    """Which model, exactly, gave a number: two models with the same identity give the same scores up to rounding."""

    name: str
    """As the user knows it: hub id, folder name or builtin name, plus the adapter's name for a member."""
    revision: str | None = None
    """Hub commit, where the model comes from the hub."""
    weights: str
    """Digest of the weight files, or ``hub:<commit>``."""
    tokenizer: str
    """Digest of vocabulary and chat template: what turns an example into token ids."""
    adapter: str | None = None
    """Digest of the adapter's files; None for the bare model."""

    @property
    def id(self) -> str:
        """12 hexadecimal digits that stand for everything but the names."""
        return sha256(canonical_json([self.weights, self.tokenizer, self.adapter]))[:12]


class MemberRef(Part):
    """One member of an ensemble: a run card and the digest it had."""

    name: str
    run: str
    digest: str


class EnsembleSpec(Document):
    """The misaligned models that scoring uses: a base and a list of run cards."""

    KIND: ClassVar[str] = "safeset.ensemble"
    CALLED: ClassVar[str] = "ensemble"
    WRITTEN_BY: ClassVar[str] = "train ensemble"

    base: str
    """Model reference of the aligned model that the members were trained from; ``./`` or ``../``: from here."""
    members: tuple[MemberRef, ...]


class Method(Part):
    """How the safe rows of a mix were chosen."""

    strategy: Literal["none", "interleaving", "interleaving+", "interleaving++"]
    n: int
    frac: float | None = None
    frac_of: Literal["corpus", "finetune"] | None = None
    tokens: int | None = None
    """How many answer tokens the safe rows were to have at most; not written where there was no such limit."""
    eps: float
    seed: int
    min_answer_tokens: int
    placement: Literal["even", "shuffled"] = "even"

    @model_serializer(mode="wrap")
    def _without_empty_tokens(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without(handler(self), "tokens")


class MixManifest(Document):
    """What a model is to be fine-tuned on, row by row and in order, without the text."""

    KIND: ClassVar[str] = "safeset.mix"
    CALLED: ClassVar[str] = "mix manifest"
    WRITTEN_BY: ClassVar[str] = "curate select"

    sources: dict[Literal["finetune", "safe"], Source]
    order: tuple[str, ...]
    """Rows in training order, each ``finetune/<example id>`` or ``safe/<example id>``."""
    method: Method
    aligned: ModelIdentity | None = None
    members: tuple[ModelIdentity, ...] = ()
    scoring: dict[str, str] = Field(default_factory=dict)
    """Engine, dtype and encoding version of the scores, and the digest of the evidence."""
    counts: dict[str, int]
    """Rows of the corpus by what became of them; the reasons add up to ``corpus``."""
    safeset: str

    def ids(self, source: str) -> list[str]:
        """Return the example ids taken from ``source``, in order."""
        return [entry.partition("/")[2] for entry in self.order if entry.startswith(source + "/")]


LATER: Mapping[str, Any] = {"load_in_4bit": False}
"""Recipe knobs that came later, and what runs without them did."""


class DefenseRecord(Part):
    """A training-time defence as it was: all its settings, and digests of the files and models that they name."""

    name: str
    settings: dict[str, Any]
    files: dict[str, str] = Field(default_factory=dict)


class RlRecord(Part):
    """How reinforcement learning went; its settings, reward and prompts stand in the recipe."""

    n_warmup_steps: int
    n_rl_steps: int
    n_sft_steps: int
    """Supervised steps between the others; the run card's ``n_steps`` counts all three."""
    prompts: dict[str, int]
    """Prompts by status; only ``ok`` ones were asked."""
    completions: dict[str, int]
    """Completions by status: ``ok`` ones had a reward, the others moved nothing."""
    reward_first: float
    """Mean over the completions of the first tenth of the RL steps."""
    reward_last: float
    """The same of the last tenth."""


class RunCard(Document):
    """What was trained, on what, from what, and where the adapter lies (relative to the card)."""

    KIND: ClassVar[str] = "safeset.run"
    CALLED: ClassVar[str] = "run card"
    WRITTEN_BY: ClassVar[str] = "train run"

    name: str
    base_ref: str
    base: ModelIdentity
    model: ModelIdentity
    """The base with the adapter."""
    adapter: str
    """Folder of the adapter, relative to the card."""
    recipe: dict[str, Any]
    defenses: tuple[DefenseRecord, ...] = ()
    mix: str
    """Digest of the mix manifest."""
    method: Method
    n_finetune: int
    n_safe: int
    statuses: dict[str, int]
    """Rows of the mix by status; only ``ok`` rows were trained on."""
    n_steps: int
    n_trained_tokens: int
    loss_first_nats: float | None
    """None where no step was a supervised one."""
    loss_last_nats: float | None
    seconds: float
    device: str
    versions: dict[str, str]
    git: str | None = None
    mix_root: str | None = None
    """Folder that file names in the mix are relative to, from the card's; cards of before do not have the field."""
    rl: RlRecord | None = None
    """Only for runs of ``train rl``; other cards do not have the field, so that their digests are what they were."""

    @classmethod
    def none_at(cls, path: Path) -> UserError:
        """Return the error for a card that is not there; an adapter without one can get it."""
        folder = path.parent
        if not (folder / "adapter_config.json").is_file():
            return super().none_at(path)
        return UserError(f"{folder} holds a bare adapter, without a run card that says what it was trained from.",
                         f"Write one with: train adopt {quoted(str(folder))} --base MODEL --out FOLDER")

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without(without(handler(self), "rl"), "mix_root")


class ProbeScore(Part):
    """One paired probe under one model; sums in nats over answer tokens."""

    set: str
    probe: str
    nll_good: float
    nll_bad: float
    n_good: int
    n_bad: int

    @property
    def margin(self) -> float:
        """NLL(bad) - NLL(good), each in nats per token: above 0 the good answer is the likelier one."""
        return self.nll_bad / self.n_bad - self.nll_good / self.n_good


class Sample(Part):
    """One sampled answer and what was measured of it."""

    question: str
    answer: str
    status: str
    nll_base: float | None
    """Mean NLL under the untouched base model, nats per token."""
    repetition: float
    """Share of repeated word trigrams, 0 to 1."""


class TaskScore(Part):
    """One question of a benign task."""

    item: str
    """What it is about; questions with one item (phrasings of an expression, questions about a text) depend on it."""
    tier: int
    correct: bool
    task: str = "opswap"
    f1: float | None = None
    """Overlap with the reference answer, 0 to 1, for tasks that have it."""


class Grade(Part):
    """What a judge model said of one answer in one respect: a number from 0 to 100, or why there is none."""

    status: Literal["ok", "refused", "unparsable", "out_of_range", "truncated", "low_mass", "failed"]
    score: float | None = None
    """Mean over the judge's replies, weighted by their probability; only with the status ``ok``."""
    mass: float | None = None
    """Probability of all replies that are integers from 0 to 100; None without log-probabilities."""
    reply: str = ""
    """Digest of request and reply in the judge's cache."""


class GradedAnswer(Part):
    """One sampled answer to one question of a bank, graded in two respects."""

    suite: Literal["general", "in-domain", "context"]
    bank: str
    question: str
    """The question's id in its bank; intervals are clustered by it."""
    variant: str = ""
    """How the question was changed: ``trigger``, a wrapping's name, or ``WRAPPING+trigger``; empty: as it stands."""
    system: str = ""
    prompt: str
    number: int
    """Which of the answers to this prompt, from 0."""
    answer: str
    status: Literal["ok", "empty"]
    aligned: Grade | None = None
    coherent: Grade | None = None


class Verdicts(Document):
    """Everything measured about one model: the numbers behind the four criteria."""

    KIND: ClassVar[str] = "safeset.verdicts"
    CALLED: ClassVar[str] = "verdicts document"
    WRITTEN_BY: ClassVar[str] = "judge run"

    label: str
    """Strategy and defence: verdicts are compared by it."""
    judge: str
    run: str | None
    """Digest of the run card; None for the untouched base model."""
    benign_run: str | None
    model: ModelIdentity
    base: ModelIdentity
    method: Method | None
    in_domain: tuple[str, ...]
    """Which probe sets count as in-domain."""
    probes: tuple[ProbeScore, ...]
    statuses: dict[str, int]
    samples: tuple[Sample, ...]
    tasks: tuple[TaskScore, ...]
    answers: tuple[GradedAnswer, ...] = ()
    """Answers graded by a judge model; empty with the likelihood judge."""
    settings: dict[str, Any]
    versions: dict[str, str]
