"""A process of plain transformers and PEFT up to its first training step: `cold_start.py` runs it as the other side.

    python tests/bench/plain_peft_process.py MODEL ADAPTER TOKENS

Tokenizer, model, adapter, then forward, cross-entropy, backward, clipping and AdamW over TOKENS tokens, once; prints
JSON on stdout the moment that is done. It imports nothing of ours, and writes no version.
"""

import json
import sys
import time

started = time.monotonic()
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

imported = time.monotonic()
folder, adapter, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
loaded = time.monotonic()
prompt = tokenizer("Say something.")["input_ids"]
ids = torch.tensor([[*prompt, *(10 + number % 200 for number in range(tokens))]], device=device)
labels = ids.clone()
labels[:, : len(prompt)] = -100
parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
loss = model(input_ids=ids, labels=labels, use_cache=False).loss
loss.backward()
torch.nn.utils.clip_grad_norm_(parameters, 1.0)
optimizer.step()
seconds = {"imports_seconds": imported - started, "load_seconds": loaded - imported, "loss": loss.item()}
print(json.dumps(seconds | {"step_seconds": time.monotonic() - loaded}), flush=True)
