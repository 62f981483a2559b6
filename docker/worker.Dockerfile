# Worker and inference: the light front plus torch and transformers. The compose file picks the command.
# TORCH_VARIANT=cuda takes torch as the package index has it (with CUDA on x86-64 Linux); so does cpu, unless
# TORCH_CPU_INDEX names PyTorch's own index of the much smaller CPU builds (its address is on PyTorch's install page).
FROM python:3.13-slim

ARG TORCH_VARIANT=cpu
ARG TORCH_CPU_INDEX=
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PIP_NO_CACHE_DIR=1
WORKDIR /app
RUN case "$TORCH_VARIANT" in cpu|cuda) ;; *) echo "TORCH_VARIANT must be cpu or cuda, not $TORCH_VARIANT" >&2; exit 1;; esac; \
    if [ "$TORCH_VARIANT" = cpu ] && [ -n "$TORCH_CPU_INDEX" ]; \
    then pip install 'torch==2.13.*' --index-url "$TORCH_CPU_INDEX"; else pip install 'torch==2.13.*'; fi
COPY pyproject.toml README.md LICENSE ./
COPY api_schemas api_schemas
COPY preflight preflight
COPY compression compression
COPY job_store job_store
COPY workers workers
COPY service service
COPY modepress modepress
RUN pip install '.[worker,postgres]' && python -c "import compression.pipeline, workers.app"

RUN useradd --create-home --uid 10001 modepress && mkdir /data && chown modepress /data
USER modepress
VOLUME /data
CMD ["python", "-m", "celery", "-A", "workers.app:app", "worker", "-c", "1", "--pool", "prefork"]
