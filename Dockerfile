# One image for all processes; compose.yml says which runs what.
FROM python:3.13-slim AS build
WORKDIR /src
RUN python -m venv /opt/clerk-sync && python -m pip install --no-cache-dir "uv>=0.9,<1"
COPY pyproject.toml uv.lock README.md Procfile ./
# The versions of the lock, from the usual index; the lock itself names none.
RUN uv export --quiet --frozen --no-dev --no-emit-project --no-header --extra sentry --extra otel --output-file requirements.txt \
    && /opt/clerk-sync/bin/pip install --no-cache-dir --require-hashes --requirement requirements.txt
COPY worker worker
COPY webhooks webhooks
COPY migrations migrations
RUN /opt/clerk-sync/bin/pip install --no-cache-dir --no-deps .

FROM python:3.13-slim
RUN useradd --system --uid 10001 --user-group --no-create-home clerk-sync
COPY --from=build /opt/clerk-sync /opt/clerk-sync
ENV PATH=/opt/clerk-sync/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
CMD ["gunicorn", "--config", "python:webhooks.server", "webhooks.main:app"]
