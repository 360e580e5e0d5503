# The image for operators: `docker build -t aqueduct .`, then
#   docker run -p 8008:8008 -v aqueduct:/data -e AQUEDUCT_SERVER__NAME=example.org aqueduct
# The settings are conduit.toml's, but for the address and the directory; mount a file over /etc/aqueduct/conduit.toml for
# others. The image for Complement is another one: complement/image.
ARG BUILD_IMAGE=rust:1-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM $BUILD_IMAGE AS build
RUN apt-get update && apt-get install -y --no-install-recommends clang libclang-dev
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin aqueduct && \
    sed -e 's/127\.0\.0\.1:8008/0.0.0.0:8008/' -e 's|^data_dir = "data"|data_dir = "/data"|' conduit.toml >target/conduit.toml

FROM $BASE_IMAGE
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libstdc++6 && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --system --home-dir /data aqueduct && install -d -o aqueduct -g aqueduct -m 0700 /data
COPY --from=build /src/target/release/aqueduct /usr/local/bin/aqueduct
COPY --from=build /src/target/conduit.toml /etc/aqueduct/conduit.toml
USER aqueduct
VOLUME /data
EXPOSE 8008
ENTRYPOINT ["aqueduct", "--config", "/etc/aqueduct/conduit.toml"]
