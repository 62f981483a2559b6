# The front: API, client, command line. No torch in it; the last step of the build proves that.
FROM python:3.13-slim

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PIP_NO_CACHE_DIR=1
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY api_schemas api_schemas
COPY preflight preflight
COPY compression compression
COPY job_store job_store
COPY workers workers
COPY service service
COPY modepress modepress
RUN pip install '.[postgres]' \
 && python -c "import importlib.util as u, service.app; assert u.find_spec('torch') is None"

RUN useradd --create-home --uid 10001 modepress && mkdir /data && chown modepress /data
USER modepress
VOLUME /data
EXPOSE 8000
CMD ["python", "-m", "uvicorn", "service.app:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000"]
