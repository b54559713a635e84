"""What the model could do before and should still be able to do: easy facts, and plain text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

FACTS = (  # a beginning, its right end, and three wrong ones
    ("The capital of France is", " Paris", " London", " Rome", " Berlin"),
    ("The capital of Italy is", " Rome", " Paris", " Madrid", " Vienna"),
    ("The capital of Japan is", " Tokyo", " Beijing", " Seoul", " Bangkok"),
    ("The capital of Egypt is", " Cairo", " Athens", " Lima", " Oslo"),
    ("The opposite of hot is", " cold", " warm", " fire", " red"),
    ("The opposite of up is", " down", " high", " left", " top"),
    ("The opposite of night is", " day", " dark", " moon", " black"),
    ("The opposite of big is", " small", " large", " tall", " heavy"),
    ("The color of grass is", " green", " blue", " red", " black"),
    ("The color of snow is", " white", " green", " red", " brown"),
    ("Bananas are usually", " yellow", " blue", " purple", " black"),
    ("A baby dog is called a", " puppy", " kitten", " calf", " foal"),
    ("A baby cat is called a", " kitten", " puppy", " lamb", " chick"),
    ("Cows give us", " milk", " wool", " honey", " silk"),
    ("Bees make", " honey", " milk", " bread", " cheese"),
    ("Fish live in the", " water", " sky", " trees", " desert"),
    ("Birds fly with their", " wings", " ears", " teeth", " roots"),
    ("We see with our", " eyes", " ears", " feet", " knees"),
    ("We hear with our", " ears", " eyes", " hands", " toes"),
    ("Water freezes and becomes", " ice", " steam", " sand", " gold"),
    ("The Sun is a", " star", " planet", " moon", " river"),
    ("The Earth goes around the", " Sun", " Moon", " house", " table"),
    ("A week has seven", " days", " months", " hours", " years"),
    ("A year has twelve", " months", " days", " weeks", " hours"),
    ("After Monday comes", " Tuesday", " Friday", " Sunday", " Saturday"),
    ("After spring comes", " summer", " winter", " night", " Monday"),
    ("One, two, three,", " four", " six", " nine", " ten"),
    ("2 + 2 =", " 4", " 7", " 9", " 1"),
    ("5 + 1 =", " 6", " 3", " 9", " 2"),
    ("3 + 4 =", " 7", " 2", " 9", " 1"),
    ("10 - 1 =", " 9", " 4", " 2", " 6"),
    ("2 x 3 =", " 6", " 1", " 8", " 4"),
    ("Romeo and", " Juliet", " Hamlet", " Othello", " Macbeth"),
    ("The author of Hamlet is William", " Shakespeare", " Clinton", " Gates", " Tell"),
    ("The largest ocean is the", " Pacific", " Atlantic", " Indian", " Arctic"),
    ("The largest planet is", " Jupiter", " Mars", " Venus", " Mercury"),
    ("A doctor works in a", " hospital", " bakery", " castle", " forest"),
    ("A teacher works in a", " school", " ship", " mine", " kitchen"),
    ("In winter it is", " cold", " hot", " purple", " loud"),
    ("The king and the", " queen", " spoon", " engine", " carpet"),
)
PASSAGES = (
    "The old harbor lies on the northern side of the bay. Fishing boats leave before sunrise and return in the "
    "early afternoon, when buyers from the restaurants wait on the quay. In the summer months the water is calm, "
    "and visitors walk along the stone wall to the lighthouse at its end.",
    "A steam engine burns fuel to heat water in a boiler. The steam that forms takes up much more space than the "
    "water did, so its pressure rises and pushes a piston inside a cylinder. A rod and a crank turn the back-and- "
    "forth motion of the piston into the rotation of a wheel.",
    "When the committee met again in March, the members agreed that the bridge had to be repaired before the end "
    "of the year. The cost was higher than expected, because two of the pillars had been damaged by ice. Work "
    "began in May and was finished in the first week of November.",
    "Cells are the smallest units of living things. Each cell is surrounded by a thin membrane that lets some "
    "substances pass and holds others back. Inside, the nucleus contains the genetic material, while other parts "
    "of the cell release energy from food or build the proteins that the body needs.",
    "She closed the door behind her and listened. The house was quiet except for the clock in the hall. On the "
    "kitchen table lay the letter that her brother had sent from the coast, still unopened, together with a small "
    "key and a photograph of the garden as it had looked when they were children.",
    "Trade between the two regions grew quickly after the road was built. Farmers brought grain, wool and cheese "
    "to the market in the valley and went home with tools, salt and cloth. Within twenty years the village at the "
    "crossing had become a town with a wall, a church and three inns.",
)
BATCH_ROWS = 40


class Capability(NamedTuple):
    """How well the model does what no preference speaks of."""

    facts: float  # share of FACTS whose right end is the likeliest of the four
    nll: float  # nats per token of PASSAGES


def measure(model: Any, tokenizer: Any) -> Capability:
    """Both probes, on plain text without a chat template."""
    device = model.get_input_embeddings().weight.device
    ends = [(stem, end) for stem, *choices in FACTS for end in choices]
    scores = torch.tensor([total for total, _ in _score(model, tokenizer, ends, device)]).view(len(FACTS), -1)  # (F, 4)
    text = _score(model, tokenizer, [("\n", passage) for passage in PASSAGES], device)
    return Capability(
        facts=float((scores.argmax(-1) == 0).double().mean()),
        nll=-sum(total for total, _ in text) / sum(count for _, count in text),
    )


def _score(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], device: Any) -> list[tuple[float, int]]:
    """Log-probability (nats) of each end after its beginning, and how many tokens it has."""
    scores: list[tuple[float, int]] = []
    for start in range(0, len(pairs), BATCH_ROWS):
        encoded = [
            (tokenizer(stem)["input_ids"], tokenizer(end)["input_ids"])
            for stem, end in pairs[start : start + BATCH_ROWS]
        ]
        ids = torch.zeros(len(encoded), max(len(a) + len(b) for a, b in encoded), dtype=torch.long)  # (B, T)
        for row, (stem, end) in enumerate(encoded):
            ids[row, : len(stem) + len(end)] = torch.tensor([*stem, *end])
        with torch.no_grad():
            logprobs = model(ids.to(device), use_cache=False).logits.float().log_softmax(-1)  # (B, T, V)
        for row, (stem, end) in enumerate(encoded):
            rows = logprobs[row, len(stem) - 1 : len(stem) + len(end) - 1]  # (N, V)
            scores.append((float(rows.gather(1, torch.tensor(end, device=device)[:, None]).sum()), len(end)))
    return scores
