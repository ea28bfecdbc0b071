"""The token stores of a run: the forget, retain and alternate sequences that its arguments and data sets make."""

from transformers import PreTrainedTokenizerBase

from efface.batching import TokenStore
from efface.hf.text.data import QuestionAnswers, Refusals, refuse_overlap, token_store
from efface.hf.text.rows import Conditions, parse_conditions
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.open_unlearning import PaddedStepping
from efface.hf.train.stepping import PackedStepping, Stepping, pairs_per_step
from efface.objectives import Objective


def unlearning_stores(
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearnArguments,
    *,
    forget: QuestionAnswers,
    retain: QuestionAnswers | None,
    forget_filter: Conditions = None,
    retain_filter: Conditions = None,
    alternate: QuestionAnswers | None = None,
) -> tuple[TokenStore, TokenStore, TokenStore | None]:
    """Return the forget, retain and alternate sequences of a run; no retain ones where the objective reads none.

    Raises:
        ValueError: as of ``UnlearnTrainer``; rows in the forget and the retain set, without ``args.allow_overlap``.
    """
    forget_store, alternate_store = _forget_stores(objective, forget, alternate, tokenizer, args, forget_filter)
    retain_store = TokenStore.empty()
    if retain is not None and objective.reads_retain():
        retain_store = tokenised(retain, tokenizer, args, "retain", retain_filter)
    if not args.allow_overlap:
        # Where other answers are trained in place of the rows' own, a row is told by its question.
        refuse_overlap(forget_store, retain_store, prompts=objective.forget_data == "alternate")
    return forget_store, retain_store, alternate_store


def check_retain(objective: Objective, retain: QuestionAnswers | None, retain_filter: Conditions) -> None:
    """Raise ValueError for an objective or a filter without the retain set that it reads."""
    if retain is not None:
        return
    if objective.reads_retain():
        raise ValueError(
            f"objective {objective.name!r} has a retain term (alpha={objective.alpha}) but no retain set; "
            "give one, or set alpha to 0"
        )
    if parse_conditions(retain_filter):
        raise ValueError("`retain_filter`: expected `retain`, the rows that it takes some of, got none")


def _forget_stores(
    objective: Objective,
    forget: QuestionAnswers,
    alternate: QuestionAnswers | None,
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearnArguments,
    rows_filter: Conditions,
) -> tuple[TokenStore, TokenStore | None]:
    """Return the sequences in the role of forget ones and, where the objective compares two answers, the alternates.

    Where refusals are drawn anew whenever a row is read, the alternates are every row's, row by row, with all of them.
    """
    other: TokenStore | None = None
    answers_a_row = 1
    if objective.forget_data != "answer":
        if alternate is not None:
            other = tokenised(alternate, tokenizer, args, "alternate", rows_filter)
        elif isinstance(forget, TokenStore) or not (args.refusal_file or args.alternate_column):
            raise ValueError(
                f"objective {objective.name!r} trains other answers to the forget questions, got none; set "
                "--refusal-file (a refusal a line) or --alternate-column, or give `alternate`"
            )
        elif args.refusal_file and args.alternate_column:
            raise ValueError("expected `refusal_file` or `alternate_column`, got both; drop one")
        else:
            refusals = None
            if args.refusal_file:
                refusals = Refusals.read(args.refusal_file, args.seed, every=stepping_of(args).draws_refusals)
                answers_a_row = len(refusals.lines) if refusals.every else 1
            column = args.alternate_column or args.answer_column
            other = tokenised(forget, tokenizer, args, "forget", rows_filter, answers=column, refusals=refusals)
        if objective.forget_data == "alternate" and answers_a_row == 1:
            return other, None
    store = tokenised(forget, tokenizer, args, "forget", rows_filter)
    if other is not None and len(other) != len(store) * answers_a_row:
        raise ValueError(
            f"`alternate`: expected {len(store)} sequences, one for each forget sequence, got {len(other)}"
        )
    return store, other


def tokenised(
    data: QuestionAnswers | None,
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearnArguments,
    name: str,
    rows_filter: Conditions,
    *,
    answers: str | None = None,
    refusals: Refusals | None = None,
) -> TokenStore:
    """Return the sequences of one set, from the token cache where they are in it."""
    # The first process of a machine fills the cache, the others read it.
    with args.main_process_first(desc=f"tokenise {name}"):
        return token_store(
            [] if data is None else data,
            tokenizer,
            name=name,
            question_column=args.question_column,
            answer_column=answers or args.answer_column,
            template=args.template,
            system_prompt=args.system_prompt,
            date_string=args.date_string,
            compat=args.compat,
            max_length=args.max_length,
            rows_filter=rows_filter,
            refusals=refusals,
            cache_dir=args.token_cache,
        )


def stepping_of(args: UnlearnArguments) -> type[Stepping]:
    """Return the way of stepping that the arguments ask for."""
    return PackedStepping if args.compat is None else PaddedStepping


def accumulation_steps(args: UnlearnArguments) -> int:
    """Return the micro-batches of an optimizer step that the plan of an epoch knows."""
    return pairs_per_step(args) // stepping_of(args).planned_pairs(args)
