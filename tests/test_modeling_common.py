"""Transformers' own common tests, run on every configuration and model of the package."""

import unittest

import transformers_common_tests

from transformers_testa import (
    TestaConfig,
    TestaForCaptioning,
    TestaForMultipleChoiceVideoQA,
    TestaForPreTraining,
    TestaForRetrieval,
    TestaForVideoQA,
    TestaModel,
    TestaTextConfig,
    TestaTextDecoder,
    TestaTextModel,
    TestaVideoConfig,
    TestaVideoModel,
)


transformers_common_tests.load()
from transformers_common_tests_src.test_configuration_common import ConfigTester  # noqa: E402
from transformers_common_tests_src.test_modeling_common import (  # noqa: E402
    ModelTesterMixin,
    floats_tensor,
    ids_tensor,
    random_attention_mask,
)


BATCH_SIZE, NUM_FRAMES, IMAGE_SIZE, PATCH_SIZE, TEXT_LENGTH = 3, 4, 8, 4, 7


def tiny_video_config(**fields) -> TestaVideoConfig:
    return TestaVideoConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_frames=NUM_FRAMES,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        **fields,
    )


def tiny_text_config(**fields) -> TestaTextConfig:
    return TestaTextConfig(
        vocab_size=99,
        hidden_size=32,
        encoder_hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        bos_token_id=1,
        enc_token_id=2,
        sep_token_id=3,
        **fields,
    )


def tiny_config() -> TestaConfig:
    video_config = tiny_video_config(merged_frames_per_layer=[1, 0], merged_patches_per_layer=[0, 1])
    return TestaConfig(video_config=video_config, text_config=tiny_text_config(), projection_dim=16)


def video_inputs() -> dict:
    return {"pixel_values_videos": floats_tensor([BATCH_SIZE, NUM_FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE])}


def text_inputs() -> dict:
    return {
        "input_ids": ids_tensor([BATCH_SIZE, TEXT_LENGTH], 90) + 4,
        "attention_mask": random_attention_mask([BATCH_SIZE, TEXT_LENGTH]),
    }


class VideoModelTester:
    """What the common tests ask of a model's own tester, for the video encoder."""

    is_training = False
    batch_size = BATCH_SIZE
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    seq_length = encoder_seq_length = 1 + NUM_FRAMES * (IMAGE_SIZE // PATCH_SIZE) ** 2

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> TestaVideoConfig:
        return tiny_video_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[TestaVideoConfig, dict]:
        return self.get_config(), video_inputs()


class TextModelTester(VideoModelTester):
    seq_length = encoder_seq_length = TEXT_LENGTH

    def get_config(self) -> TestaTextConfig:
        return tiny_text_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[TestaTextConfig, dict]:
        return self.get_config(), text_inputs()


class BothModelTester(VideoModelTester):
    def get_config(self) -> TestaConfig:
        return tiny_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[TestaConfig, dict]:
        return self.get_config(), video_inputs() | text_inputs()


class CommonTests(ModelTesterMixin):
    test_resize_embeddings = False
    model_tester_class: type
    common_properties: list[str] = ["hidden_size", "num_attention_heads", "num_hidden_layers"]
    config_fields: dict = {"hidden_size": 32, "num_attention_heads": 4}

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self,
            config_class=type(self.model_tester.get_config()),
            has_text_modality=False,
            common_properties=self.common_properties,
            **self.config_fields,
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class TestaVideoModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (TestaVideoModel,)
    model_tester_class = VideoModelTester

    def test_attention_outputs(self):
        self.model_tester.encoder_seq_length = 1 + (IMAGE_SIZE // PATCH_SIZE) ** 2  # attention stays within a frame
        super().test_attention_outputs()

    def test_model_get_set_embeddings(self):
        model = TestaVideoModel(self.model_tester.get_config())
        self.assertIs(model.get_input_embeddings(), model.embeddings.patch_embeddings)
        self.assertIsNone(model.get_output_embeddings())


class TestaTextModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (TestaTextModel,)
    model_tester_class = TextModelTester
    test_resize_embeddings = True


class TestaModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (TestaModel,)
    model_tester_class = BothModelTester
    test_resize_embeddings = True
    common_properties = ["projection_dim", "video_pooling"]
    config_fields = {}

    def setUp(self):
        super().setUp()
        if "test_eager_matches_sdpa_inference" in self._testMethodName:
            self.skipTest(
                "It feeds one modality; both encoders pass it above, and test_modeling.py compares them together"
            )

    @unittest.skip(reason="There are two encoders, each tested above; their hidden states are in *_model_output")
    def test_hidden_states_output(self):
        pass

    @unittest.skip(reason="There are two encoders, each tested above; their attentions are in *_model_output")
    def test_attention_outputs(self):
        pass

    @unittest.skip(reason="There are two encoders, each tested above; their hidden states are in *_model_output")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class TrainableModelTester(BothModelTester):
    is_training = True


class TestaForRetrievalTest(TestaModelTest):
    all_model_classes = (TestaForRetrieval,)
    model_tester_class = TrainableModelTester


class DecoderTester(TextModelTester):
    is_training = True

    def get_config(self) -> TestaTextConfig:
        return tiny_text_config(is_decoder=True)

    def prepare_config_and_inputs_for_common(self) -> tuple[TestaTextConfig, dict]:
        inputs = text_inputs()
        states = floats_tensor([BATCH_SIZE, 5, 32])
        return self.get_config(), inputs | {"encoder_hidden_states": states, "labels": inputs["input_ids"]}


class TestaTextDecoderTest(CommonTests, unittest.TestCase):
    all_model_classes = (TestaTextDecoder,)
    # The distribution leaves out the tests of generation; test_modeling_decoder.py has ours.
    all_generative_model_classes = ()
    model_tester_class = DecoderTester
    test_resize_embeddings = True


class TestaForPreTrainingTest(TestaModelTest):
    all_model_classes = (TestaForPreTraining,)
    model_tester_class = TrainableModelTester


class CaptioningTester(TrainableModelTester):
    def prepare_config_and_inputs_for_common(self) -> tuple[TestaConfig, dict]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, inputs | {"labels": inputs["input_ids"]}


class TestaForCaptioningTest(TestaModelTest):
    all_model_classes = (TestaForCaptioning,)
    model_tester_class = CaptioningTester

    @unittest.skip(reason="The decoder's configuration is the text configuration with is_decoder=True: a copy")
    def test_internal_model_config_and_subconfig_are_same(self):
        pass


class QuestionTester(TrainableModelTester):
    def prepare_config_and_inputs_for_common(self) -> tuple[TestaConfig, dict]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, inputs | {f"answer_{name}": value for name, value in text_inputs().items()}


class TestaForVideoQATest(TestaModelTest):
    all_model_classes = (TestaForVideoQA,)
    model_tester_class = QuestionTester
    test_resize_embeddings = False  # two vocabularies, of questions and of answers


class ChoiceTester(TrainableModelTester):
    def prepare_config_and_inputs_for_common(self) -> tuple[TestaConfig, dict]:
        choices = {name: value[:, None].repeat(1, 2, 1) for name, value in text_inputs().items()}
        return self.get_config(), video_inputs() | choices | {"labels": ids_tensor([BATCH_SIZE], 2)}


class TestaForMultipleChoiceVideoQATest(TestaModelTest):
    all_model_classes = (TestaForMultipleChoiceVideoQA,)
    model_tester_class = ChoiceTester
