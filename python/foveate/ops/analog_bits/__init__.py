"""Analog bits: ids as rows of +-scale (Chen, Zhang, Hinton, ICLR 2023; Pix2Seq-D, ICCV 2023)."""
