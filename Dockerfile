# docker build -t mim-refiner . && docker run --rm --gpus all -v "$PWD:/data" mim-refiner demo --out demo-out
FROM python:3.12-slim

WORKDIR /opt/mim-refiner
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt ".[hf,onnx,tensorboard]"

RUN useradd --create-home refiner
USER refiner
WORKDIR /data
ENTRYPOINT ["mim-refiner"]
CMD ["--help"]
