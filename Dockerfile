# docker build -t mim-refiner . && docker run --rm --gpus all -v "$PWD:/data" mim-refiner demo --out demo-out
FROM python:3.12-slim
RUN useradd --uid 1000 --create-home refiner

WORKDIR /opt/mim-refiner
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt ".[hf,onnx,tensorboard]"

# By number, so that an orchestrator can see that it is not root.
USER 1000
WORKDIR /data
ENTRYPOINT ["mim-refiner"]
CMD ["--help"]
