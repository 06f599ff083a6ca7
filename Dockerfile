# The whole pipeline, on a CPU:
#   docker build -t prelar . && docker run --name prelar prelar && docker cp prelar:/prelar/reports .
FROM python:3.12-slim-bookworm

# git: DVC asks it for the project; libosmesa6: MuJoCo draws without a display; make runs it all.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git libosmesa6 make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 prelar

WORKDIR /prelar
RUN chown 1000:1000 /prelar
USER 1000
COPY --chown=1000:1000 . .
RUN make setup UV=1
CMD ["make", "repro"]
