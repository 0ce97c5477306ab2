import { useSignal } from "@preact/signals";
import { Dialog } from "../components/dialog";
import { t } from "../i18n";
import { contextUse } from "./composer";
import { update } from "./persistence";
import { setDefaults } from "./sampling";
import { SamplingForm } from "./samplingForm";
import { current, model, promptSize } from "./state";

/** System prompt and sampling settings of this conversation. */
export function ChatSettings(props: { onClose: () => void }) {
  const { system, settings } = current.value;
  const isDefault = useSignal(false);
  return (
    <Dialog title={t("chatSettings")} side onClose={props.onClose}>
      <div class="form">
        <SamplingForm
          system={system}
          settings={settings}
          onChange={(change) => {
            isDefault.value = false;
            update(change);
          }}
        />
        {model.value?.context && promptSize.value && (
          <p class="note">{contextUse(promptSize.value, model.value.context).label}</p>
        )}
        <button type="button" onClick={() => update({ settings: {}, system: null })}>
          {t("reset")}
        </button>
        <button
          type="button"
          onClick={() => {
            setDefaults({ system, settings });
            isDefault.value = true;
          }}
        >
          {t("makeDefault")}
        </button>
        <p class="note" role="status">
          {isDefault.value ? t("isDefault") : ""}
        </p>
      </div>
    </Dialog>
  );
}
