"""The papers behind the methods, as a model card cites them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """
    A paper on arXiv.

    Args:
        id (`str`):
            arXiv id.
        key (`str`):
            Key of its BibTeX entry.
        title (`str`):
            Title.
        authors (`str`):
            Authors in BibTeX's form; long lists end in `and others`.
    """

    id: str
    key: str
    title: str
    authors: str

    @property
    def url(self) -> str:
        return f"https://huggingface.co/papers/{self.id}"

    @property
    def bibtex(self) -> str:
        return (
            f"@article{{{self.key},\n"
            f"    title  = {{{{{self.title}}}}},\n"
            f"    author = {{{self.authors}}},\n"
            f"    year   = 20{self.id[:2]},\n"
            f"    eprint = {{arXiv:{self.id}}},\n"
            "}"
        )

    @property
    def for_trl(self) -> dict[str, str]:
        """In the form of TRL's `_paper`."""
        return {"title": self.title, "id": self.id, "citation": self.bibtex}


# Of several methods of this package; those of one stand with it.
CANCELLATION = Paper(
    "2605.08666",
    "cheng2026cancellation",
    "The Cancellation Hypothesis in Critic-Free RL: From Outcome Rewards to Token Credits",
    "Tianhao Cheng and Zeyu Huang and Zihan Qiu and Yu Cheng and Edoardo Ponti and Yinghui Xu and Ivan Titov and "
    "Zenglin Xu",
)
DESIGN_CONDITIONS = Paper(
    "2604.13088",
    "ding2026design",
    "Design Conditions for Intra-Group Learning of Sequence-Level Rewards: Token Gradient Cancellation",
    "Fei Ding and Yongkang Zhang and Youwei Wang and Zijian Zeng",
)

# Methods of TRL's.
GRPO = Paper(
    "2402.03300",
    "shao2024deepseekmath",
    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    "Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Mingchuan Zhang and Y. K. Li and "
    "Y. Wu and Daya Guo",
)
DAPO = Paper(
    "2503.14476",
    "yu2025dapo",
    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    "Qiying Yu and Zheng Zhang and Ruofei Zhu and Yufeng Yuan and others",
)
DR_GRPO = Paper(
    "2503.20783",
    "liu2025understanding",
    "Understanding R1-Zero-Like Training: A Critical Perspective",
    "Zichen Liu and Changyu Chen and Wenjun Li and Penghui Qi and Tianyu Pang and Chao Du and Wee Sun Lee and Min Lin",
)
GSPO = Paper(
    "2507.18071",
    "zheng2025group",
    "Group Sequence Policy Optimization",
    "Chujie Zheng and Shixuan Liu and Mingze Li and Xiong-Hui Chen and Bowen Yu and Chang Gao and Kai Dang and "
    "Yuqiong Liu and Rui Men and An Yang and Jingren Zhou and Junyang Lin",
)
MINIMAX = Paper(
    "2506.13585",
    "minimax2025minimaxm1",
    "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    "{MiniMax}",
)
SAPO = Paper(
    "2511.20347",
    "gao2025soft",
    "Soft Adaptive Policy Optimization",
    "Chang Gao and Chujie Zheng and Xiong-Hui Chen and Kai Dang and Shixuan Liu and Bowen Yu and An Yang and "
    "Shuai Bai and Jingren Zhou and Junyang Lin",
)
LUSPO = Paper(
    "2602.05261",
    "liu2026length",
    "Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR",
    "Fanfan Liu and Youyang Yin and Peng Shi and Siqi Yang and Zhixiong Zeng and Haibo Qiu",
)
VESPO = Paper(
    "2602.10693",
    "shen2026vespo",
    "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training",
    "Guobin Shen and Chenxiao Zhao and Xiang Cheng and Lei Huang and Xing Yu",
)
LITE_PPO = Paper(
    "2508.08221",
    "liu2025tricks",
    "Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning",
    "Zihe Liu and Jiashun Liu and Yancheng He and Weixun Wang and others",
)
HIGH_ENTROPY = Paper(
    "2506.01939",
    "wang2025beyond",
    "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning",
    "Shenzhi Wang and Le Yu and Chang Gao and Chujie Zheng and others",
)
GDPO = Paper(
    "2601.05242",
    "liu2026gdpo",
    "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization",
    "Shih-Yang Liu and Xin Dong and others",
)
