"""Train a Transformer with a loop you can read: what a Trainer would do for you stands below on lines of its own.

    python train.py                             the small model, under a minute on two CPU cores
    python train.py --dim 512 --num-heads 8     the paper's size
    python train.py --resume runs/<name>        go on where a run stopped, bit for bit

Lines tagged [hidden: ...] are what PyTorch Lightning does silently; comparison/README.md explains each by that name.
"""

import math
import sys
import time
from contextlib import nullcontext

import torch
import wandb
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from transformer_scratch import summary
from transformer_scratch.config import load_config, settle_config
from transformer_scratch.data import Batch, BatchSampler, Task, make_datasets, make_loader, split_pairs
from transformer_scratch.errors import TrainingFault, exit_codes
from transformer_scratch.evaluation import exact_match, predict
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer, make_schedule
from transformer_scratch.run_folder import RunFolder, open_run
from transformer_scratch.runtime import (
    compile_model,
    prepare_cpu,
    rng_state,
    seed_everything,
    set_rng_state,
    start_processes,
)
from transformer_scratch.signals import StopRequest
from transformer_scratch.tracking import answers_table, log_results, never_fatal, start_wandb


def token_loss(network: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy over the batch's target tokens; padding is not even computed. -> scalar."""
    logits = network(batch.source, batch.decoder_input, batch.tokens)  # (N, V)
    return F.cross_entropy(logits, batch.target.flatten()[batch.tokens])


def write_rows(run: RunFolder, waiting: list[dict]) -> None:
    """Fetch the losses and norms that wait on the device, into metrics.jsonl. Nothing else makes an epoch wait for it.

    Raises TrainingFault at the first loss or norm that is not a number; what was before it is written.
    """
    losses = run.processes.sum(torch.stack([row["train/loss_step"] for row in waiting])).tolist()
    norms = torch.stack([row["grad_norm"] for row in waiting]).tolist()
    for number, (row, loss, norm) in enumerate(zip(waiting, losses, norms, strict=True)):
        overflow = row.get("skipped", False)  # fp16: an infinite norm is why the update was skipped
        row |= {"train/loss_step": loss, "grad_norm": None if overflow else norm}
        if not math.isfinite(loss) or not (overflow or math.isfinite(norm)):
            run.append(waiting[:number])
            raise TrainingFault(
                f"bad numbers at step {row['step']}: loss {loss}, gradient norm {norm} at learning rate {row['lr']:g}. "
                "Try a smaller --lr, a longer --warmup-steps, or --amp off. last.pt is from before that"
            )
    run.append(waiting)


def main(arguments: list[str] | None = None) -> None:
    # ---------------------------------------------------------------- set-up: what every later line stands on
    processes = start_processes()
    config, saved = load_config(arguments, processes)
    config, device, dtype, reasons = settle_config(config, processes)
    stop = StopRequest(processes)
    seed_everything(config.seed)  # [hidden: seeding]
    torch.set_float32_matmul_precision("high")
    reasons["threads"] = prepare_cpu(config.dim, config.batch_size)

    task = Task(config.num_categories, config.seq_len)
    splits = split_pairs(task, config.holdout, config.seed)
    train_data, val_data, test_data = make_datasets(task, splits, config.num_datas, config.seed)
    shard = {"rank": processes.rank, "world_size": processes.world_size}
    sampler = BatchSampler(train_data, config.batch_size, True, config.seed, config.accumulate, **shard)
    train_loader = make_loader(sampler, config.num_workers, pin_memory=device.type == "cuda")
    val_loader, test_loader = (
        make_loader(BatchSampler(data, config.batch_size, **shard)) for data in (val_data, test_data)
    )

    model = Transformer(
        task.vocab_size, config.dim, config.num_heads, config.num_layers, config.ffn_dim, config.dropout,
        config.tie_embeddings, task.pad_id,
    )  # fmt: skip
    model.to(device)  # [hidden: model to the device]
    parameters = list(model.parameters())  # listed once: the walk through all modules takes a while
    optimizer = make_optimizer(model, config.lr, config.weight_decay, fused=dtype is not torch.float16)
    scheduler = make_schedule(optimizer, config.warmup_steps)
    # torch.amp is today's spelling of torch.cuda.amp, whose own names warn since PyTorch 2.4.
    autocast = torch.amp.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    if config.compile:
        reasons["compile"] = compile_model(model)
    network = model  # `network` is called in training, `model` owns the weights
    if processes.world_size > 1:
        network = DistributedDataParallel(network)  # [hidden: gradients averaged over the processes]
        seed_everything(config.seed + processes.rank)  # the first weights are alike everywhere, dropout is not

    first_epoch = first_batch = step = epoch_tokens = update_loss = 0
    epoch_loss = torch.zeros((), device=device)  # loss x tokens, summed over the epoch so far
    ranking = []  # [validation loss, epoch] of the checkpoints kept, the best first
    run = open_run(config, processes, saved)
    if saved:
        first_epoch, first_batch, step, ranking = (saved[key] for key in ("epoch", "batch", "step", "ranking"))
        if first_epoch >= config.max_epochs and run.is_finished():
            return summary.print_finished(run, config)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        scaler.load_state_dict(saved["scaler"])
        epoch_loss, epoch_tokens = saved["epoch_loss"][processes.rank].to(device), saved["epoch_tokens"][processes.rank]
        set_rng_state(saved["rng"][processes.rank])
        run.cut_metrics(saved["metrics_size"])
    tracking = start_wandb(config, run)
    summary.print_start(config, reasons, model, splits, run, tracking)

    def save_state(next_epoch: int, next_batch: int) -> None:
        """Write last.pt: all that decides what comes next, so that a resumed run is the same run."""
        run.save_last(
            model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(),
            scaler=scaler.state_dict(), epoch=next_epoch, batch=next_batch, step=step, ranking=ranking,
            epoch_loss=processes.gather(epoch_loss.cpu()), epoch_tokens=processes.gather(epoch_tokens),
            rng=processes.gather(rng_state()), config=run.settings,
        )  # fmt: skip

    @torch.inference_mode()  # [hidden: no gradients outside training]
    def evaluate(split: str, loader, first_index: int = 0) -> float:
        """The mean loss over all tokens of a split, on all processes."""
        loss_sum, num_tokens = torch.zeros((), device=device), 0
        for index, batch in enumerate(loader, start=first_index):
            with autocast:
                loss = token_loss(model, batch.to(device))
            loss_sum += loss * batch.num_tokens
            num_tokens += batch.num_tokens
            with never_fatal("W&B"):
                wandb.log({f"{split}/loss_step": loss, f"{split}/batch": index})
        mean = processes.mean(loss_sum, num_tokens)
        if not math.isfinite(mean):
            raise TrainingFault(f"the {split} loss is {mean} after step {step}; try a smaller --lr")
        return mean

    def stop_if_asked() -> None:
        if exit_code := stop.exit_code():
            bar.close()
            summary.print_stopped(run, step)
            sys.exit(exit_code)

    # ----------------------------------------------------------------------------------------- the epoch loop
    if not saved:
        save_state(0, 0)
    bar = summary.progress_bar(config.max_epochs * math.ceil(len(sampler) / config.accumulate), step, run)
    for epoch in range(first_epoch, config.max_epochs):
        model.train()  # [hidden: train mode]
        sampler.set_epoch(epoch, first_batch)  # [hidden: a new order every epoch]
        started, tokens_before = time.perf_counter(), epoch_tokens
        waiting = []  # lines for metrics.jsonl whose numbers are still on the device

        for index, batch in enumerate(train_loader, start=first_batch):
            batch = batch.to(device)  # [hidden: batch to the device]
            epoch_ends = index + 1 == len(sampler)
            update_ends = epoch_ends or (index + 1) % config.accumulate == 0
            # A batch counts by its share of the update's tokens, which is 1 with one process and --accumulate 1.
            share = batch.num_tokens / batch.update_tokens

            with nullcontext() if update_ends or network is model else network.no_sync():  # [hidden: no_sync]
                with autocast:  # [hidden: autocast]
                    loss = token_loss(network, batch)
                # Gradients are averaged over the processes, but shares have to be added up: hence world_size.
                scaler.scale(loss * (share * processes.world_size)).backward()  # [hidden: backward]
            update_loss += loss.detach() * share
            epoch_loss += loss.detach() * batch.num_tokens
            epoch_tokens += batch.num_tokens
            if not update_ends:
                continue  # [hidden: accumulation]

            scaler.unscale_(optimizer)  # [hidden: unscale before clipping]
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)  # [hidden: clipping]
            scale = scaler.get_scale()
            scaler.step(optimizer)  # [hidden: optimizer step]
            scaler.update()  # [hidden: scaler update]
            # The gradients overflowed in fp16: the scaler has left the weights alone.
            skipped = scaler.get_scale() < scale
            step += 1
            row = {"step": step, "epoch": epoch, "train/loss_step": update_loss, "lr": scheduler.get_last_lr()[0]}
            row |= {"grad_norm": grad_norm, "skipped": True} if skipped else {"grad_norm": grad_norm}
            waiting.append(row)
            if not skipped:
                scheduler.step()  # [hidden: schedule]
            optimizer.zero_grad(set_to_none=True)  # [hidden: zero_grad]
            update_loss = 0
            bar.update()

            saving = stop.exit_code() or (config.save_every and step % config.save_every == 0)
            if saving or epoch_ends or step % config.log_every == 0:  # [hidden: reading the loss only now and then]
                write_rows(run, waiting)
                bar.set_postfix(loss=f"{row['train/loss_step']:.4f}", refresh=False)
                with never_fatal("W&B"):
                    wandb.log(row)  # [hidden: logging]
                waiting = []
            if saving:
                save_state(epoch, index + 1)
                stop_if_asked()

        model.eval()  # [hidden: eval mode]
        row = {"step": step, "epoch": epoch}
        row["train/loss_epoch"] = processes.mean(epoch_loss, epoch_tokens)  # [hidden: epoch mean]
        tokens_per_second = (epoch_tokens - tokens_before) * processes.world_size / (time.perf_counter() - started)
        row["val/loss_epoch"] = evaluate("val", val_loader, epoch * len(val_loader))  # [hidden: validation]
        with autocast:
            answers = predict(model, task, splits.val)
        row["val/exact_match"] = exact_match(answers)
        run.append([row])
        with never_fatal("W&B"):
            wandb.log({**row, "tokens/s": tokens_per_second, "val/answers": answers_table(answers, splits)})
        summary.print_epoch(bar, row)

        ranking = sorted([*ranking, [row["val/loss_epoch"], epoch]])[: config.save_top_k]  # [hidden: the best k]
        run.save_ranked(ranking, epoch, step=step, model=model.state_dict(), config=run.settings)
        first_batch = epoch_tokens = 0
        epoch_loss.zero_()
        save_state(epoch + 1, 0)  # [hidden: a checkpoint to go on from]
        stop_if_asked()

    # ----------------------------------------------------------------------------- the test, with the best weights
    bar.close()
    model.load_state_dict(run.load_best(ranking)["model"])  # [hidden: the best weights, not the last]
    model.eval()
    row = {"step": step, "epoch": config.max_epochs, "test/loss_epoch": evaluate("test", test_loader)}
    with autocast:
        predictions = {"trained": predict(model, task, splits.train), "test": predict(model, task, splits.test)}
    row["test/exact_match"] = exact_match(predictions["test"])
    stop_if_asked()
    run.append([row])
    summary.print_end(run, row, predictions)
    with never_fatal("W&B"):
        wandb.log(row)
        log_results(run, model, task, splits)
        wandb.alert("Training has ended", f"{run.path.name}: test exact match {row['test/exact_match']:.1%}")
        wandb.finish()
    stop_if_asked()


if __name__ == "__main__":
    with exit_codes():
        main()
