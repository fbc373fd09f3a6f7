"""What the commands of ``glmv`` say of themselves: shown by --help, kept apart from the code that runs them."""

EXAMPLES = """\
examples:
  glmv check examples/pretrain.yaml                        what would run: tree, parameters, tokens, ranks
  glmv check examples/sft.yaml parallel.tensor=4           the same with one value changed
  glmv plan examples/pretrain.yaml --gpu h100 --gpus 512   memory, step time, the best layouts
  glmv train examples/quickstart.yaml --ranks 4            four ranks on this machine
  torchrun --nproc-per-node 8 --nnodes 4 ... -m megatron_glmv train examples/pretrain.yaml
  glmv rl examples/rl.yaml --ranks 2                       answers, rewards, updates: two ranks on this machine
  glmv train examples/sft.yaml --ranks 8 --restarts 3      the same, started again when a rank dies
  glmv status runs/sft                                     where a run stands, from its files
  glmv stop runs/sft                                       save it and end it; the next start goes on
  glmv import GLM-4.1V-9B-Base checkpoints/base            a Hugging Face folder as a checkpoint, for any layout
  glmv export runs/sft runs/sft/hf                         a run's newest checkpoint as a Hugging Face folder
  glmv verify runs/sft/hf runs/sft                         are the two one model?
  glmv reward answers.jsonl --config rewards.yaml          what are these answers worth?

Exit codes: 0 done, or stopped on request; 1 the run failed; 2 the command line or the configuration cannot be used.
"""

CHECK = """\
Validates without importing torch, prints the resolved tree as YAML and a summary as comments: the output is again a valid
configuration. Files are merged left to right, then a.b=value arguments; a value is read as YAML (null, true, [1, 2]).
"""

PLAN = """\
Arithmetic, no GPU and no torch: memory of every pipeline stage, the schedule played through, traffic, step time, MFU and days,
and the fastest layouts that fit, each with the overrides to append. Weights, gradients and optimizer state are exact;
activations are counted tensor by tensor; times come from the GPU's peaks and stated efficiencies. Rows are measured from
packed data where it is on disk, else assumed. Ends with 1 where the layout does not fit, naming what is missing and the least
change that fits. --hardware takes a YAML file of fields that differ, as matmul_efficiency: 0.6 or network_gbs: 25.
"""

TRAIN = """\
Under torchrun every rank runs this command. Outside torchrun, --ranks N starts N ranks on this machine; without --ranks
the run has one rank. A run folder that holds a complete checkpoint is resumed from it.

`glmv stop RUN_FOLDER`, or SIGTERM or SIGUSR1 to any rank, ends the run after the step it is in, with a checkpoint and exit
code 0; the same command goes on from there.
"""

RL = """\
Reinforcement learning with curriculum sampling: prompts are drawn by difficulty, an engine samples groups of answers, verifiers
judge them, and the policy is updated in the layout that the file names. Ranks, launchers, checkpoints and resuming are those of
glmv train. docs/rl.md describes prompts, engines, rewards and every part.
"""

STATUS = """\
Reads files only: whether the run goes on, is finished, has failed or was killed, and where; step, speed and time left; loss or
reward; held-out results; the newest checkpoint; restarts and faults; samples that did not decode. Works for a run on any
machine of a shared disk. With --exit-code, for a script that decides whether to start it again: 0 finished; 3 it can go on (it
runs, was stopped or killed, a node was lost, it hung, it never started); 1 a restart would fail the same way (configuration,
data, checkpoint). With --launch ID what other launches have left there does not count: 3 where this one started no rank.
"""

STOP = """\
Writes RUN_FOLDER/stop. The ranks see it within seconds, finish the step (in reinforcement learning the iteration) they are in,
save a checkpoint and end with exit code 0. The same command that started the run goes on from there. SIGTERM or SIGUSR1 to any
rank, or to the launcher of --ranks, does the same.
"""

PREFLIGHT = """\
On every node of a job, beside each other (srun, one process a node), with --among: matrix products, all-reduce within the
node and with two neighbours, writing to FOLDER and reading again, free memory and disk, GPUs and their memory errors, clocks,
and the versions of Python, torch, Megatron, driver and this code. Each node leaves FOLDER/NODE.node.json, also when a part
hangs. Once, afterwards, with --judge and the stage's configuration: a table, with what is wrong with slow, broken and silent
nodes; FOLDER/exclude.txt names them, FOLDER/use.txt the nodes of the largest number that the stage can be dealt to. Exit code
1: too few are left. Without either, this machine alone is checked. examples/slurm runs all of it.
"""

ERRORS = """\
Reads the logs that the ranks of a job left: the first error with the end of its log, then the others in a line each. Ranks that
only say that a peer has gone come last. examples/slurm keeps the page as RUN_FOLDER/logs/errors.txt.
"""

IMPORT = """\
Writes the weights of a Hugging Face folder as a checkpoint, a few rows at a time: no GPU, and a few GB of memory for any size.
Training starts from it in any layout with checkpoint.start_from=CHECKPOINT. Its tokenizer and processor files are kept with it.
"""

EXPORT = """\
Writes config.json, the weights as safetensors and the processor's files: a folder that transformers loads. The layout the
checkpoint was trained in does not matter; no GPU is needed, and a few GB of memory for any size. A checkpoint with adapters
(model.lora) is written with its adapters merged into the weights; with --adapter, the adapters alone are written, as a folder
that peft loads on the Hugging Face model.
"""

VERIFY = """\
Compares every tensor to the bit, then runs transformers on the folder and Megatron's layers on the checkpoint, in float32, on a
fixed set of rows (text, one image, several images, a video, all packed in one row), a layer of each in memory at a time.
import and export do the same before what they write gets its name, and leave the result in it as parity.json.
"""

REWARD = """\
Each line of FILE.jsonl holds domain, question, answer (the reference) and response (the text of the model, with its special
tokens), and optionally key, subcategory, options, media. The scores are written as the same lines with a key reward; a command
that was interrupted continues where it stopped. docs/rl.md describes domains, settings and reasons.
"""
