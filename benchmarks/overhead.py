"""What the exits cost when no row leaves: full depth with every exit computed, against the stock model.

usage: python benchmarks/overhead.py [--hidden 768] [--blocks 12] [--lengths 16 64 128] [--rounds 40] [--threads 2]

About a minute on 2 free cores. Random weights, batch 1, float32. Stock model and PEFT model take turns in one process;
a ratio is the median over rounds of time / time of the same round, its quartiles beside it. Bit-equality of the
logits is checked on the way.
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import partial

import numpy as np
import peft
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification

import badge_peft
from badge_peft.evaluation.timing import Runner, take_turns

NEVER = {"policy": "divergence", "threshold": 1e-9}  # decisions are made, and no row leaves
EARLY = "early exit, none taken"


def main() -> None:
    """Prints one line per sequence length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--config", type=json.loads, default={}, help='of the adapter: \'{"exit_pooling": "mean"}\'')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.hidden // 64,
        intermediate_size=4 * args.hidden,
    )
    stock = BertForSequenceClassification(config).eval()
    model = peft.get_peft_model(copy.deepcopy(stock), badge_peft.BadgeConfig(train_head=False, **args.config)).eval()
    print(
        f"BERT, d={args.hidden}, {args.blocks} blocks, batch 1, {args.threads} threads, {args.rounds} rounds, "
        f"{args.config}; torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    )
    for length in args.lengths:
        batch = {"input_ids": torch.randint(1000, 20000, (1, length))}
        calls = {
            "stock": partial(stock, **batch),
            "all exits": partial(model, **batch),
            EARLY: partial(model.early_exit_forward, **batch, **NEVER),
        }
        with torch.inference_mode():
            same = torch.equal(stock(**batch).logits, model(**batch).logits)
            runners = [Runner(lambda _, call=call: call(), read=lambda _: None) for call in calls.values()]
            timed = take_turns(runners, [None], args.rounds)
        times = {name: np.asarray(found.seconds) for name, found in zip(calls, timed, strict=True)}
        line = f"S={length}: stock {np.median(times['stock']) * 1e3:.2f} ms; logits bit-equal: {same}"
        for name in ("all exits", EARLY):
            q1, median, q3 = np.quantile(times[name] / times["stock"], [0.25, 0.5, 0.75])
            line += f"; {name} / stock {median:.3f} ({q1:.3f}-{q3:.3f})"
        print(line)


if __name__ == "__main__":
    main()
