"""The token stores of a run: its forget, retain and alternate sequences, tokenised from the data sets."""

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
    """Return the forget, retain and alternate sequences of a run.

    The retain store is empty if the objective has no retain term. The alternate store is None if the objective does not
    compare two answers.

    Raises:
        ValueError: as documented for ``UnlearnTrainer``; or a row is in the forget and in the retain set, and
            ``args.allow_overlap`` is False.
    """
    forget_store, alternate_store = _forget_stores(objective, forget, alternate, tokenizer, args, forget_filter)
    retain_store = TokenStore.empty()
    if retain is not None and objective.reads_retain():
        retain_store = tokenised(retain, tokenizer, args, "retain", retain_filter)
    if not args.allow_overlap:
        # If alternate answers replace the rows' own answers, only the questions can be compared.
        refuse_overlap(forget_store, retain_store, prompts=objective.forget_data == "alternate")
    return forget_store, retain_store, alternate_store


def check_retain(objective: Objective, retain: QuestionAnswers | None, retain_filter: Conditions) -> None:
    """Raise ValueError if there is no retain set and the objective has a retain term, or a retain filter is given."""
    if retain is not None:
        return
    if objective.reads_retain():
        raise ValueError(
            f"`retain`: expected a retain set, which the retain term of objective {objective.name!r} needs "
            f"(alpha={objective.alpha}), got none; pass one, or set alpha to 0"
        )
    if parse_conditions(retain_filter):
        raise ValueError(
            "`retain_filter`: expected a retain set to filter, got none; pass `retain`, or drop the filter"
        )


def _forget_stores(
    objective: Objective,
    forget: QuestionAnswers,
    alternate: QuestionAnswers | None,
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearnArguments,
    rows_filter: Conditions,
) -> tuple[TokenStore, TokenStore | None]:
    """Return the forget sequences, and the alternate sequences or None.

    - An objective that trains alternate answers only: the alternate sequences take the place of the forget sequences,
      and the second value is None.
    - An objective that compares two answers: both stores, with one alternate sequence per forget sequence.
    - Refusals that are drawn each time a row is read (``compat``): both stores, and the alternate store has every
      refusal for every row, row by row.
    """
    other: TokenStore | None = None
    answers_a_row = 1
    if objective.forget_data != "answer":
        if alternate is not None:
            other = tokenised(alternate, tokenizer, args, "alternate", rows_filter)
        elif isinstance(forget, TokenStore) or not (args.refusal_file or args.alternate_column):
            raise ValueError(
                f"`alternate`: expected alternate answers to the forget questions, which objective {objective.name!r} "
                "trains, got none; set --refusal-file (one refusal per line) or --alternate-column, or pass `alternate`"
            )
        elif args.refusal_file and args.alternate_column:
            raise ValueError("`alternate`: expected `refusal_file` or `alternate_column`, got both; drop one of them")
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
            f"`alternate`: expected {len(store)} sequences, one per forget sequence, got {len(other)}; pass one "
            "alternate answer for each forget row"
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
    """Return the sequences of one set, from the token cache if they are there."""
    # The first process of each machine fills the cache; the other processes then read it.
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
    """Return the ``Stepping`` class for the arguments: ``PaddedStepping`` with ``compat``, else ``PackedStepping``."""
    return PackedStepping if args.compat is None else PaddedStepping


def accumulation_steps(args: UnlearnArguments) -> int:
    """Return the number of planned micro-batches per optimizer step: 1, or with ``compat`` that of open-unlearning."""
    return pairs_per_step(args) // stepping_of(args).planned_pairs(args)
