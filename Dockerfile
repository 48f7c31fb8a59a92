# fastbeit for CUDA 13 with the versions that the tests run with (constraints.txt). apptainer.def is the same for clusters.
#
#     docker build -t fastbeit .
#     docker run --gpus all --shm-size 16g -v /data:/data -v "$PWD/runs:/home/fastbeit/runs" fastbeit \
#         torchrun --nproc-per-node 8 -m fastbeit pretrain configs/beit_base_in1k.yaml out=runs/base data.index=/data/train.idx
#
# --shm-size: decoding processes hand batches over in shared memory, of which Docker gives 64 MB. A batch of BEiT-B has
# 48 MB on each of eight GPUs, and each of its four processes may have two ready: 3 GB in all, and DALI and NCCL want
# some too. runs/ has to be writable for the user 1001.
FROM nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04

# Triton compiles its launchers with gcc and Python's headers
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/fastbeit
ENV PATH=/opt/fastbeit/bin:$PATH

COPY . /opt/src
RUN pip install --no-cache-dir -c /opt/src/constraints.txt '/opt/src[gpu,log,parquet]'

RUN useradd --create-home --uid 1001 fastbeit
USER fastbeit
WORKDIR /home/fastbeit
RUN cp -r /opt/src/configs configs
CMD ["fastbeit", "--help"]
