"""The whole training without an option: what one would write on a whiteboard. Read this first, then train.py.

    python -m comparison.minimal_loop

The same numbers, bit for bit, as: python train.py --clip-norm 0 --warmup-steps 0 --amp off --accelerator cpu
"""

import torch
from torch.nn import functional as F

from transformer_scratch.data import Batch, BatchSampler, Task, make_datasets, make_loader, split_pairs
from transformer_scratch.evaluation import exact_match, predict
from transformer_scratch.model import Transformer

SEED = 42
DIM, NUM_HEADS, NUM_LAYERS, DROPOUT = 32, 1, 6, 0.1
NUM_DATAS, BATCH_SIZE, NUM_EPOCHS = 38_400, 128, 3
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1


def token_loss(model: Transformer, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy over the target's tokens, without padding."""
    logits = model(batch.source, batch.decoder_input, batch.tokens)  # (N, V)
    return F.cross_entropy(logits, batch.target.flatten()[batch.tokens])


def main() -> tuple[Transformer, list[float]]:
    """-> the trained model and the loss of every update."""
    torch.set_num_threads(1)  # as train.py does for a model this small; more would add up in another order
    torch.manual_seed(SEED)
    task = Task()
    splits = split_pairs(task, holdout=0.2, seed=SEED)
    train_data, val_data, _ = make_datasets(task, splits, NUM_DATAS, SEED)
    sampler = BatchSampler(train_data, BATCH_SIZE, shuffle=True, seed=SEED)
    train_loader, val_loader = make_loader(sampler), make_loader(BatchSampler(val_data, BATCH_SIZE))

    model = Transformer(task.vocab_size, DIM, NUM_HEADS, NUM_LAYERS, dropout=DROPOUT, pad_id=task.pad_id)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )

    losses = []
    for epoch in range(NUM_EPOCHS):
        model.train()  # dropout on
        sampler.set_epoch(epoch)  # another order
        for batch in train_loader:
            optimizer.zero_grad()
            loss = token_loss(model, batch)
            loss.backward()  # the gradient of the loss with respect to every weight
            optimizer.step()  # every weight a little downhill
            losses.append(loss.item())

        model.eval()  # dropout off
        loss_sum = num_tokens = 0
        with torch.inference_mode():  # nothing is kept for a backward pass
            for batch in val_loader:
                loss_sum += token_loss(model, batch).item() * batch.num_tokens
                num_tokens += batch.num_tokens
        answers = predict(model, task, splits.val)  # greedy, without seeing the target
        print(f"epoch {epoch}: loss {loss_sum / num_tokens:.4f}, exact match {exact_match(answers):.1%}")
    return model, losses


if __name__ == "__main__":
    main()
