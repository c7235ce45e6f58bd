"""What a user would do with the results, in a process that knows nothing of the job: used by test_story.py."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, run = sys.argv[1], Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(run / "merged")
merged = AutoModelForCausalLM.from_pretrained(run / "merged")
question = [{"role": "user", "content": "What is 9 and 3?"}]
asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = merged.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
with torch.no_grad():
    of_merged = merged.float()(**asked).logits
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    of_base = plain(**asked).logits
    of_adapter = PeftModel.from_pretrained(plain, str(run / "adapter"))(**asked).logits
facts = {
    "answer": tokenizer.decode(answer, skip_special_tokens=True),
    "difference": (of_merged - of_adapter).abs().mean().item(),
    "changed": (of_merged - of_base).abs().mean().item(),
    "scale": of_base.abs().mean().item(),
}
print(json.dumps(facts))  # noqa: T201 - read by the test
